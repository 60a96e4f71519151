"""Train a Llama on text: ``python -m llama_torch.train``, no arguments needed."""

from collections.abc import Sequence

from .common.torchrun import exit_process
from .config import TrainConfig
from .training.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(argv, TrainConfig)


if __name__ == "__main__":
    exit_process(main)
