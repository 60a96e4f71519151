"""Errors, files, the command line and devices, for every other package."""
