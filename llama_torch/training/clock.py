"""Measure the time of training alone, and the speed that it gives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """A stopwatch of training steps, stopped while anything else is done.

    A GPU computes steps after the host has launched them: the clock waits for it before it stops,
    so that no step's time is counted as another's or left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0  # measured up to the last stop
        self.since: float | None = None  # when the clock was started; None = stopped

    def start(self) -> None:
        """Start the clock, or let it run on."""
        self.since = self.since if self.since is not None else time.perf_counter()

    def stop(self) -> None:
        """Stop the clock once the device has computed all that was launched."""
        if self.since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - self.since
            self.since = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock for the body, and start it afterwards if it ran before."""
        was_running = self.since is not None
        self.stop()
        yield
        if was_running:  # after an error there is no more training
            self.start()

    def take(self) -> float:
        """Return the seconds of training since the last call."""
        with self.stopped():
            taken, self.seconds = self.seconds, 0.0
        return taken


def speed_of(n_tokens: int, seconds: float, at_peak: float) -> float | None:
    """Return tokens per second; None beyond ``at_peak``, which the device can never reach.

    Then the time or the peak was measured wrongly, as a peak is on a busy CPU.
    """
    return n_tokens / seconds if n_tokens <= at_peak * seconds and seconds > 0 else None


UNKNOWN_SPEED = "speed not known: measured beyond the device's peak"
