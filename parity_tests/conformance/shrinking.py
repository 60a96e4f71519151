"""An end to the search for a smaller failing example, for code that takes seconds for each."""

import math
import time

SECONDS = 30.0  # of the search, for each test


class Shrinking:
    """The examples of one test that were run, and the time of the first that failed."""

    def __init__(self) -> None:
        self.since = math.inf
        self.run: set[str] = set()

    def begun(self, example: str) -> None:
        """Note an example that is run."""
        self.run.add(example)

    def failed(self) -> None:
        """Note that an example failed."""
        self.since = min(self.since, time.monotonic())

    def end(self) -> None:
        """End the search: no smaller example would say more."""
        self.since = -math.inf

    def is_over(self, example: str) -> bool:
        """Return whether an example is not to be run: it is new, and the time is spent.

        One that was run, failing or not, is run again: Hypothesis asks for the same result.
        """
        return time.monotonic() - self.since > SECONDS and example not in self.run
