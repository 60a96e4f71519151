"""Run pytest on the installed conformance suite, apart from the current folder's own settings."""

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

import parity_tests.conformance
from llama_common.errors import InputError
from parity_tests.plugins import PLUGINS

from .cache import cache_folder
from .flags import of_unknown

CONFORMANCE = Path(parity_tests.conformance.__file__).parent
SETTINGS = Path(__file__).with_name("suite.ini")


class ErrorOutput:
    """Standard error that holds back what is written until pytest knows its configuration.

    What pytest says of a wrong command line takes several lines.
    """

    def __init__(self, real: TextIO) -> None:
        self._real, self._held = real, list[str]()
        self.is_open = False

    def write(self, text: str) -> int:
        """Write text, or hold it back."""
        if self.is_open:
            return self._real.write(text)
        self._held.append(text)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def release(self) -> None:
        """Write what is held back, and all that follows."""
        self.is_open = True
        self._real.write("".join(self._held))
        self._held.clear()

    def complaint(self) -> str:
        """Return what is held back as the one line that says what is wrong, and forget it."""
        lines = [line.strip() for line in "".join(self._held).splitlines()]
        self._held.clear()
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
        found = errors or [line for line in lines if line] or ["pytest could not begin"]
        return of_unknown(found[0].removeprefix("ERROR: ").removeprefix("Exit: "))


class Watch:
    """A plug-in that notes how far pytest came."""

    def __init__(self, errors: ErrorOutput) -> None:
        self._errors = errors
        self.interrupted = False
        self.refusal = ""
        self._plugins: pytest.PytestPluginManager | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep the configuration; refuse words beside the flags, which pytest takes for paths."""
        self._plugins = config.pluginmanager
        for word in config.option.file_or_dir[:-1]:
            pytest.exit(_unwanted(word), 2)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        """Let errors through: the command line was right."""
        self._errors.release()

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note Ctrl-C or pytest.exit, which pytest handles; then one line alone is printed."""
        self.interrupted = excinfo.errisinstance(KeyboardInterrupt)
        if isinstance(excinfo.value, pytest.exit.Exception):
            self.refusal = excinfo.value.msg
        if self._plugins is not None and (self.interrupted or self.refusal):
            self._plugins.unregister(name="terminalreporter")


def _unwanted(word: str) -> str:
    """Return what is wrong with a word that is no flag's value."""
    if "::" in word:
        return f"{word}: no flag takes this word; --check {word.rpartition('::')[2]} runs one check"
    if re.fullmatch(r"[\w./\\-]+:[\w.]+", word):
        return f"{word}: a second implementation; run the command once for each"
    return f"{word}: no flag takes this word; tests other than the suite's are run by pytest itself"


class Parsed:
    """A plug-in that ends pytest once it knows its command line."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self) -> int:
        """Run no test."""
        return 0


def require_known_flags(arguments: Sequence[str]) -> None:
    """Raise InputError for a flag that neither the suite nor pytest has; nothing is run."""
    errors = ErrorOutput(sys.stderr)
    if _run(arguments, errors, Parsed()):
        raise InputError(errors.complaint())


def run_pytest(arguments: Sequence[str], ports: Sequence[str], command: str) -> int:
    """Run pytest on the suite; return the command's exit code.

    Raises InputError for what pytest refuses, and KeyboardInterrupt after Ctrl-C.
    """
    errors = ErrorOutput(sys.stderr)
    watch = Watch(errors)
    of_ports = (f"--backend={port}" for port in ports)
    code = _run(["--of-command", command, *of_ports, *arguments], errors, watch)
    if watch.interrupted:
        raise KeyboardInterrupt
    if watch.refusal:
        raise InputError(watch.refusal)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise InputError("no check is selected; llama-parity test --list names them")
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return code
    if not errors.is_open:  # the command line was wrong
        raise InputError(errors.complaint())
    return 2


def _run(arguments: Sequence[str], errors: ErrorOutput, plugin: Parsed | Watch) -> int:
    """Run pytest on the suite's folder, with its settings and plug-ins; return its exit code."""
    given = [
        *("-c", str(SETTINGS), "--rootdir", str(CONFORMANCE), "--confcutdir", str(CONFORMANCE)),
        *("-o", f"cache_dir={cache_folder() / 'pytest'}", "--no-header", "-q"),
        "--noconftest",  # the suite has none, and no other is asked for
        *("-p", "no:benchmark"),  # pytest-benchmark makes a folder .benchmarks where it runs
        *(word for name in PLUGINS for word in ("-p", name)),
        *arguments,
        str(CONFORMANCE),
    ]
    with contextlib.redirect_stderr(errors):  # type: ignore[type-var]
        return int(pytest.main(given, plugins=[plugin]))
