"""Run the suite on public packages and write the grid: ``python -m parity_tests.grid``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError
from llama_parity.command.cache import cache_folder

from . import page
from .causes import read_causes
from .environments import InstallError
from .recorders import Recorder, chosen
from .results import RESULTS, failed_result, read_results, write_result
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
    """Folder of the environments, some 15 GB for all; the user's cache folder by default."""
    results: str = str(RESULTS)
    """Folder of the results."""
    profile: str = "quick"
    """Number of examples: quick, default or thorough."""

    def __post_init__(self) -> None:
        if self.action not in ("run", "page"):
            raise InputError(f"{self.action}: no such action; give run or page")
        if self.profile not in ("quick", "default", "thorough"):
            raise InputError(f"--profile {self.profile}: give quick, default or thorough")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(GridConfig, argv)
    results = Path(config.results)
    if config.action == "page":
        page.write(read_results(results), read_causes(), DOCS)
        return 0
    recorders = chosen(list(config.names))
    for recorder in recorders:
        print(f"{recorder.name}: {', '.join(recorder.requires)}", flush=True)
        result = _run(recorder, config)
        write_result(result, results)
        for backend, run in result["runs"].items():
            words = run.get("error") or f"{run['verdict']}, {run['compared']} compared"
            over = f", stopped by {run['over']}" if "over" in run else ""
            print(f"  {backend}: {words}{over}; {run['seconds']:.0f} s", flush=True)
        if "not_run" in result:
            print(f"  not run: {result['not_run']}", flush=True)
    return 0


def _run(recorder: Recorder, config: GridConfig) -> dict[str, Any]:
    """Return a package's result, of whatever end: it stops no other's run."""
    cache = Path(config.environments) if config.environments else cache_folder() / "grid"
    python = Path(config.python) if config.python else None
    try:
        return run_recorder(recorder, cache, python, config.profile)
    except InstallError as error:
        requires = [*recorder.requires, *recorder.npm]
        return failed_result(recorder.name, recorder.title, requires, f"{error}")


if __name__ == "__main__":
    sys.exit(main())
