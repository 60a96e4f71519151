"""Ctrl-C while Python still imports the modules of a command: the process ends without a word.

Python would raise KeyboardInterrupt wherever it is. Amid an import that is a traceback of other
people's code, an ImportError, or nothing at all. Before the first line of a command's package runs,
Python's own start-up has it.
"""

import os
import signal
import sys
from types import FrameType


def end_while_importing() -> None:
    """Give SIGINT its default action, the end of the process, until ``cli.run`` takes it over.

    It stays as it is where it is ignored (``nohup``, a shell's background) or handled already.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_starting_command(package: str) -> bool:
    """Return whether ``python -m PACKAGE.COMMAND`` is about to import the command's module.

    While it imports the packages around that, Python has ``-m`` in the place of the module's file.
    """
    place = len(sys.orig_argv) - len(sys.argv)  # of the module's name, before its arguments
    module = "".join(sys.orig_argv[place : place + 1]).removeprefix("-m")
    return sys.argv[:1] == ["-m"] and module.startswith(f"{package}.")


def raise_or_end(signum: int, frame: FrameType | None) -> None:
    """Handle SIGINT: raise KeyboardInterrupt, or amid an import end the process by the signal."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        frame = frame.f_back
    raise KeyboardInterrupt
