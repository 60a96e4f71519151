"""Runs of the suite itself in a process of their own, with the quick profile."""

from .jobs import Job

QUICK = ("--hypothesis-profile", "quick", "-p", "no:cacheprovider", "-p", "no:xdist")


def suite(*arguments: str) -> Job:
    """Return a run of the suite with these arguments."""
    return Job(lambda _: ("-m", "pytest", *QUICK, *arguments))
