"""Run the suite on public packages and write the grid: ``python -m parity_tests.grid``."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_text
from llama_common.files import require_writable
from llama_common.interrupt import raise_or_end
from llama_parity.command.cache import cache_folder

from . import page
from .causes import read_causes
from .cells import without_cause, without_red
from .environments import InstallError
from .recorders import Recorder, chosen
from .results import RESULTS, failed_result, kept_date, read_results, write_result
from .running import run_recorder

DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass(frozen=True)
class GridConfig:
    """Run the conformance suite on public packages, or write the page of the results."""

    command: ClassVar[str] = "python -m parity_tests.grid"

    action: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="run|page")]
    """run: test the packages; page: write docs/grid.md and docs/grid.html."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Packages, by their files in parity_tests/ports; all where none is named."""
    python: str = ""
    """Python of an environment that has the packages, in place of ones made for each."""
    environments: str = ""
    """Folder of the environments, some 40 GB for all; the user's cache folder by default."""
    results: str = str(RESULTS)
    """Folder of the results."""
    profile: str = "quick"
    """Number of examples: quick, default or thorough."""

    def __post_init__(self) -> None:
        if self.action not in ("run", "page"):
            raise InputError(f"{self.action}: no such action; give run or page")
        if self.profile not in ("quick", "default", "thorough"):
            raise InputError(f"--profile {self.profile}: give quick, default or thorough")
        check_text("results", self.results)
        if self.action == "page" and self.names:
            raise InputError(f"page {self.names[0]}: it is written of all results; give no name")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(GridConfig, argv)
    results = Path(config.results)
    if config.action == "page":
        found, causes = read_results(results), read_causes()
        page.write(found, causes, DOCS)
        for line in (*without_cause(found, causes), *without_red(found, causes)):
            print(line)
        return 0
    recorders = chosen(list(config.names))
    python = _program(config.python) if config.python else None
    _require_results(results, recorders)
    with _ended_as_interrupted():
        for recorder in recorders:
            print(f"{recorder.name}: {', '.join(recorder.requires)}", flush=True)
            _keep(_run(recorder, config, python), results)
    return 0


def _require_results(results: Path, recorders: Sequence[Recorder]) -> None:
    """Raise InputError, before hours of work, where the results cannot be written."""
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"no folder can be made there ({error.strerror})"
        raise InputError(f"--results {results}: {why}; name another place") from None
    for recorder in recorders:
        require_writable(results / f"{recorder.name}.json", f"--results {results}")


def _program(name: str) -> Path:
    """Return the absolute path of a Python, its links as they are; InputError for none."""
    found = shutil.which(name)
    if found is None:
        raise InputError(f"--python {name}: no such program; give an environment's bin/python")
    return Path(os.path.abspath(found))


@contextlib.contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """Let kill and the end of a terminal end what runs, as Ctrl-C does, where they would end us."""
    signals = [
        one
        for one in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(one) is signal.SIG_DFL  # nohup ignores the latter
    ]
    try:
        for one in signals:
            signal.signal(one, raise_or_end)
        yield
    finally:
        for one in signals:
            signal.signal(one, signal.SIG_DFL)


def _keep(result: dict[str, Any], results: Path) -> None:
    """Write a result and print it; one that says nothing of the package replaces none that does."""
    for backend, run in result["runs"].items():
        words = run.get("error") or f"{run['verdict']}, {run['compared']} compared"
        over = f", stopped by {run['over']}" if "over" in run else ""
        print(f"  {backend}: {words}{over}; {run['seconds']:.0f} s", flush=True)
    kept = kept_date(result["name"], results) if "not_run" in result else None
    if "not_run" in result:
        stays = f"; the result of {kept} stays" if kept else ""
        print(f"  not run: {result['not_run']}{stays}", flush=True)
    if not kept:
        write_result(result, results)


def _run(recorder: Recorder, config: GridConfig, python: Path | None) -> dict[str, Any]:
    """Return a package's result, of whatever end: it stops no other's run."""
    cache = Path(config.environments) if config.environments else cache_folder() / "grid"
    try:
        return run_recorder(recorder, cache, python, config.profile)
    except InstallError as error:
        requires = [*recorder.requires, *recorder.npm]
        return failed_result(recorder.name, recorder.title, requires, f"{error}")


if __name__ == "__main__":
    sys.exit(main())
