"""Ctrl-C and SIGTERM: at once before training, after the step in hand during it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .parallel import is_launched

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


PATIENCE = 60  # seconds


def leave_to_parent(worker: int) -> None:
    """Outlive both signals in a data worker: a group is sent them, and its trainer needs it yet.

    That one finishes the step in hand, and ends the worker: with SIGTERM, and again when it ends
    itself, if it must. Hence a second one is obeyed, but not in a job (see Stop.hears_twice).
    """
    heard = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        signal.alarm(PATIENCE if heard == 1 or is_launched() else 1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
