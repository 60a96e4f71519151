"""An end to the search for a smaller failing example, for code that takes seconds for each."""

import math
import time

SECONDS = 30.0  # of the search, for each test


class Shrinking:
    """The failing examples of one test, and the time of the first."""

    def __init__(self) -> None:
        self.since = 0.0
        self.failing: set[str] = set()

    def failed(self, example: str) -> None:
        """Note a failing example."""
        if not self.failing:
            self.since = time.monotonic()
        self.failing.add(example)

    def end(self) -> None:
        """End the search: no smaller example would say more."""
        self.since = -math.inf

    def is_over(self, example: str) -> bool:
        """Return whether an example is not to be run: it is new, and the time is spent."""
        late = bool(self.failing) and time.monotonic() - self.since > SECONDS
        return late and example not in self.failing
