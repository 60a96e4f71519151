"""Train a reward model on pairs of answers: ``python -m llama_torch.reward --init-from DIR``."""

from collections.abc import Sequence

from .common.torchrun import exit_process
from .finetuning_config import RewardConfig
from .training.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(argv, RewardConfig)


if __name__ == "__main__":
    exit_process(main)
