"""Command-line tools and their parts; they are run from a clone and not installed."""
