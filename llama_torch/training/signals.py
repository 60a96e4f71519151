"""Stop a run at SIGINT or SIGTERM: at once before training, after the current training step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = signal.SIGINT, signal.SIGTERM


class Stopped(KeyboardInterrupt):
    """Signal ``signum`` ended the run, after it saved the checkpoint of step ``saved``, if any."""

    def __init__(self, signum: int, saved: int | None = None) -> None:
        self.signum, self.saved = signum, saved


class Stop:
    """The signal received, if any; while ``deferred``, the training loop polls ``signum``."""

    def __init__(self, signals_are_duplicated: bool = False) -> None:
        self.signum = 0  # of the last signal; 0 = none
        self.deferred = False
        # A process of a job receives its process group's signal, and torchrun forwards it again.
        self.signals_are_duplicated = signals_are_duplicated

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal that the loop will poll; raise Stopped for any other."""
        will_be_polled = self.deferred and (not self.signum or self.signals_are_duplicated)
        self.signum = signum
        if not will_be_polled:
            raise Stopped(signum)


@contextmanager
def signals(signals_are_duplicated: bool = False) -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM by a Stop, and restore the handlers afterwards.

    A signal that the process was started to ignore stays ignored. Python delivers signals to its
    main thread alone; in any other thread no handler is set.
    """
    stop, before = Stop(signals_are_duplicated), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop.handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
