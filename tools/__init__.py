"""Command-line tools, and what compare.py is made of; no package of its own to install."""
