"""``llama-parity test MODULE:OBJECT``: the adapter's check, then pytest on the installed suite."""

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_common import cli
from llama_common.errors import InputError
from llama_common.files import require_writable
from llama_common.nearest import did_you_mean

from ..comparison.port_names import require_importable
from . import flags
from .cache import cache_folder
from .errors import as_input_errors
from .new import write_skeleton

HELP = """\
usage: llama-parity test MODULE:OBJECT [FLAGS] [PYTEST'S FLAGS]
       llama-parity test FILE.py:OBJECT [FLAGS] [PYTEST'S FLAGS]

Run the conformance suite on an implementation: a class or an object with a method logits, in an
installed module, one of the current folder, or a file; or a shipped one: torch, jax, transformers.

  --new FILE.py         write an implementation to fill in, and stop
  --basic               check the adapter alone: arrays, shapes, transposed matrices, token order
                        (the suite checks it first; --no-basic leaves that out)
  --profile NAME        number of examples: quick, default, thorough, search (new ones each time)
  --list                print the ids of the checks, and stop
  --check ID            run this check alone (repeatable): an id, or a pattern with *
  --xfails-file FILE    checks that are to fail, one id a line, with # REASON if you like; one
                        that passes, or compares nothing, is an error
  --skips-file FILE     checks not to run, in the same form
  --report FILE.json    write verdicts, errors and failures to a file
  --reproduce BLOB      run one failing example again, as its report says

Pytest's own: -k, -x, --junitxml FILE and others (pytest --help); -n N with pytest-xdist.
Exit code: 0 = no check failed, 1 = one did, 2 = bad input."""

PROFILES = ("quick", "default", "thorough", "search")
PORT = re.compile(r"[\w./\\-]+:[\w.]+")


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(list(argv)))


def _main(argv: list[str]) -> int:
    options, rest = _parser().parse_known_args(argv)
    if options.help:
        print(HELP)
        return 0
    if options.new is not None:
        return _write_new(options.new, rest)
    if options.profile is not None and options.profile not in PROFILES:
        raise InputError(
            f"--profile {options.profile}: not one of {', '.join(PROFILES)};"
            f"{did_you_mean(options.profile, PROFILES)}".removesuffix(";")
        )
    if options.list:
        flags.require_alone("--list", _others(options, rest), "prints the ids of all checks")
        return _list()
    if options.report is not None:
        require_writable(Path(options.report).resolve(), f"--report {options.report}")
    _prepare_environment()
    from .run import require_known_flags, run_pytest

    if not options.basic:
        flags.require_usable(rest)
        require_known_flags(rest)
    ports = options.backend or [_take_port(rest)]
    if options.basic:
        flags.require_alone("--basic", _others(options, rest), "checks the adapter alone")
    command = shlex.join(["llama-parity", "test", *argv])
    with as_input_errors():
        for port in ports:
            require_importable(port)
        code = _run_basic(options, rest, ports, command)
    if code is not None:
        return code
    profile = [] if options.profile is None else ["--hypothesis-profile", options.profile]
    report = [] if options.report is None else ["--report", options.report]
    return run_pytest([*profile, *report, *rest], ports, command)


def _others(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the words beside an implementation and the flags --list, --basic and --report."""
    profile = [] if options.profile is None else ["--profile"]
    no_basic = ["--no-basic"] if options.no_basic else []
    report = ["--report"] if options.report is not None and options.list else []
    words = rest[1:] if options.list and rest and not rest[0].startswith("-") else rest
    return [*profile, *no_basic, *report, *words]


class _Parser(argparse.ArgumentParser):
    """A parser whose error is an InputError."""

    def error(self, message: str) -> Any:
        """Raise the complaint."""
        raise InputError(f"{message.removeprefix('argument ')}; see llama-parity test --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--new", metavar="FILE")
    parser.add_argument("--basic", action="store_true")
    parser.add_argument("--no-basic", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--profile")
    parser.add_argument("--report", metavar="FILE")
    parser.add_argument("--backend", action="append")
    return parser


def _write_new(name: str, rest: Sequence[str]) -> int:
    if rest:
        raise InputError(f"--new takes nothing beside it, got {' '.join(rest)}")
    command = write_skeleton(name)
    print(f"{name}: fill in logits, then run\n  {command}")
    return 0


def _take_port(rest: list[str]) -> str:
    """Remove the implementation from the words that are not ours, and return it."""
    if rest and not rest[0].startswith("-"):
        return rest.pop(0)
    for i in range(1, len(rest)):
        if PORT.fullmatch(rest[i]) and rest[i - 1] not in flags.WITH_VALUE:
            return rest.pop(i)
    raise InputError(
        "test: no implementation is named; give MODULE:OBJECT or FILE.py:OBJECT, as in "
        "llama-parity test my_llama.py:Port (--new my_llama.py writes one to fill in)"
    )


def _prepare_environment() -> None:
    """Set the environment of this process and of pytest-xdist's, before NumPy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("PARITY_THREADS", "1"))
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(cache_folder() / "hypothesis"))
    # The current project's own: its flags and plug-ins are of its own tests, its backend is not
    # asked for, its profile not known here.
    for name in ("PARITY_BACKEND", "PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    if os.environ.get("HYPOTHESIS_PROFILE") not in PROFILES:
        os.environ.pop("HYPOTHESIS_PROFILE", None)


def _list() -> int:
    from parity_tests.plugins.expectations import known_checks

    print("\n".join(known_checks()))
    return 0


def _run_basic(
    options: argparse.Namespace, rest: Sequence[str], ports: Sequence[str], command: str
) -> int | None:
    """Check the adapters; return the exit code, or None where the suite is to follow."""
    from parity_tests.conformance.basic import FINDINGS, check_adapter
    from reference_np.backend import load

    backends = {port: load(port) for port in ports}
    some = ("--reproduce", "--collect-only", "--co", "--check", "--lf", "--last-failed")
    if not options.basic and (options.no_basic or any(w.split("=")[0] in some for w in rest)):
        return None
    for port, backend in backends.items():
        if not callable(getattr(backend, "logits", None)):
            print(f"adapter {port}: has no method logits to check; the suite checks from_directory")
            FINDINGS[port] = []
            continue
        FINDINGS[port] = check_adapter(backend)
        for finding in FINDINGS[port]:
            print(f"adapter {port}: {finding.kind}: {finding.sentence}")
        if not FINDINGS[port]:
            print(f"adapter {port}: arrays, shapes, order and sizes are right")
    findings = [finding for port in ports for finding in FINDINGS[port]]
    spoilt = any(finding.spoils for finding in findings)
    if not (spoilt or options.basic):
        return None
    code = 1 if findings else 0
    if spoilt and not options.basic:
        print("the suite was not run: nearly every check would fail so (--no-basic runs it)")
    if options.report is not None:
        _write_report(options.report, ports, code, command)
    return code


def _write_report(name: str, ports: Sequence[str], code: int, command: str) -> None:
    from parity_tests.plugins import processor, run_report

    document = run_report.as_document(ports, code, command, [processor.describe()])
    run_report.write(Path(name), document)
