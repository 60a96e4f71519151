"""Export a run's model from a training checkpoint: ``python -m llama_torch.export runs/1``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check, printable
from llama_common.files import new_folder

from .checkpoint import step_folders
from .checkpoint.file_names import RUN_FILE
from .common.state_file import MOST
from .training.origin import recorded_model
from .training.run_file import read_run, require_consistent


@dataclass(frozen=True)
class ExportConfig:
    """Write a Hugging Face model directory from a training checkpoint, whole or in shards.

    A run without --fsdp and --tp writes its model directory at every checkpoint; one with them at
    its end. This command is for the time before that, and for earlier checkpoints.
    """

    command: ClassVar[str] = "python -m llama_torch.export"

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    to: str = ""
    """Directory to write; empty = the run directory itself."""
    step: int = 0
    """Step of the checkpoint; 0 = the newest."""

    def __post_init__(self) -> None:
        check(0 <= self.step <= MOST, "step", self.step, "must be 0 or a step")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(ExportConfig, argv)
    out = Path(config.run)
    if not (out / RUN_FILE).is_file():
        raise InputError(f"{out}: holds no run; name the directory of one")
    record = read_run(out)
    model = recorded_model(record)
    require_consistent(record)
    folder = (
        step_folders.final_folder(out, config.step) if config.step else step_folders.newest(out)
    )
    if folder is None or not folder.is_dir():
        there = ", ".join(map(str, step_folders.steps(out))) or "none"
        raise InputError(f"{out}: has no such checkpoint; there are: {there}")
    target = Path(config.to or config.run)
    if (target / RUN_FILE).exists() and not target.samefile(out):
        raise InputError(f"--to {target} holds another run; choose another directory")
    from .training.state_tensors import export_model  # imports torch: a wrong flag is told before

    try:
        if target.is_dir() and any(target.iterdir()):
            export_model(target, folder, model, out)  # each file by itself
        else:
            with new_folder(target) as temporary:
                export_model(temporary, folder, model, out)
    except OSError as error:
        raise InputError(f"--to {target} cannot be written ({error}); choose another") from None
    print(f"{printable(str(target))}: the model of step {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
