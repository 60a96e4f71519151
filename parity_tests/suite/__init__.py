"""Tests of the suite itself: its imports, examples and command line."""
