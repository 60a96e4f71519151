"""What every other package uses: errors, files, the command line, devices."""
