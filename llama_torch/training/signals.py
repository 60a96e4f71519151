"""Ctrl-C and SIGTERM: at once before training, after the step in hand during it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = signal.SIGINT, signal.SIGTERM


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did."""

    def __init__(self, signum: int, saved: int | None = None) -> None:
        self.signum, self.saved = signum, saved


class Stop:
    """What has been asked for by signal; ``deferred`` = someone looks at ``asked`` in time."""

    def __init__(self, hears_twice: bool = False) -> None:
        self.asked = 0  # a signal's number
        self.deferred = False
        # A process of a job is sent what its group is sent, and torchrun passes it on once more.
        self.hears_twice = hears_twice

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal if it can wait; raise Stopped for every other."""
        waits = self.deferred and (not self.asked or self.hears_twice)
        self.asked = signum
        if not waits:
            raise Stopped(signum)


@contextmanager
def signals(hears_twice: bool = False) -> Iterator[Stop]:
    """Let both signals ask for a stop, and give them back their handlers afterwards.

    One that the process was started to ignore stays ignored. Python hands signals to its main
    thread alone: in any other nothing is done.
    """
    stop, before = Stop(hears_twice), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: found for number, found in before.items() if found != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop.handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
