"""Fine-tune on reward models' scores: ``python -m llama_torch.ppo --init-from DIR``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common.torchrun import exit_process
from .ppo_config import PpoConfig
from .training.command import run_command

if TYPE_CHECKING:
    from .rlhf.ppo_task import PpoTask


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(argv, PpoConfig, _make_task)


def _make_task() -> "PpoTask":
    from .rlhf.ppo_task import PpoTask  # imports torch

    return PpoTask()


if __name__ == "__main__":
    exit_process(main)
