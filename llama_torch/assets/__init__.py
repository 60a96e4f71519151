"""Files the package carries, so that it never needs the network."""
