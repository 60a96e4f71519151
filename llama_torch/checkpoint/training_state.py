"""Open the training state of a checkpoint, whether it is one file or shards."""

from pathlib import Path

from llama_common.errors import InputError

from .file_names import METADATA_FILE
from .single_file import SingleFile
from .state_interface import StateReader, TrainingState


def open_state(folder: Path) -> StateReader:
    """Return a reader of a checkpoint's training state, in the encoding it was written in."""
    if not (folder / METADATA_FILE).is_file():
        return SingleFile(folder)
    from .shards import StateShards  # imports torch.distributed.checkpoint, for 0.2 s

    return StateShards(folder)


def open_checkpoint(folder: Path) -> tuple[StateReader, int, list[int]]:
    """Return a reader of ``checkpoints/STEP``, its step, and the steps that were skipped.

    Raises InputError for metadata that is damaged, or of another step than the folder's name.
    """
    reader = open_state(folder)
    step, skipped = reader.metadata()
    if folder.name != str(step):
        raise InputError(f"{folder}: is of step {step}; rename it")
    return reader, step, skipped


def load_state(folder: Path) -> TrainingState:
    """Read a checkpoint's whole training state onto the CPU; raise InputError if it is damaged."""
    reader = open_state(folder)
    step, skipped = reader.metadata()
    return TrainingState(reader.read_whole(reader.shapes()), step, skipped)
