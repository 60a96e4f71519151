"""Processes that tests start, to kill them or to train together."""
