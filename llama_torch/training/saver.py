"""The interface for saving a run's checkpoints, and the choice between one file and shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch.optim import Optimizer

from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .file_saver import FileSaver


class Saver(Protocol):
    """Saves a run's checkpoints, its best model and its exports; every process calls it."""

    keeps_best: bool  # in this process

    def validated(self, step: int, val_loss: float) -> None:
        """Save the model to best/ if its validation loss (nats per token) is the lowest."""
        ...

    def save(self, step: int, skipped: Sequence[int], wait: bool) -> list[int]:
        """Save the training state after ``step`` steps; return the steps of complete checkpoints.

        An asynchronous saver completes the checkpoint before it returns only if ``wait``. Raises
        InputError, and keeps the last checkpoint, where a tensor is not finite.
        """
        ...

    def completed(self) -> list[int]:
        """Return the steps whose checkpoints have been completed since the last call."""
        ...

    def export(self) -> None:
        """Write the newest checkpoint's model to the run directory, if ``save`` has not done so."""
        ...


def make_saver(
    out: Path,
    model: Llama,
    optimizer: Optimizer,
    parallel: Parallel,
    keep_last: int = 2,
    keep_best: bool = False,
) -> Saver:
    """Return the saver of the run in ``out``: shards where the model is sharded, else one file.

    The newest ``keep_last`` checkpoints are kept. Raises InputError where best/ of a resumed run
    cannot be read.
    """
    if parallel.is_sharded:
        # Imports torch.distributed.checkpoint, which an unsharded run does not need.
        from .shard_saver import ShardSaver

        return ShardSaver(out, model, optimizer, parallel, keep_last)
    return FileSaver(out, model, optimizer, parallel, keep_last, keep_best)
