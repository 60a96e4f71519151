"""Write a training state anew, in its other encoding or with other tensors."""

import warnings
from pathlib import Path

from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.shards import StateShards
from llama_torch.checkpoint.state_interface import TrainingState
from llama_torch.checkpoint.training_state import load_state


def to_shards(folder: Path, state: TrainingState | None = None) -> None:
    """Put shards in the place of a checkpoint's one file, with its state or another one."""
    state = state or load_state(folder)
    shards = StateShards(folder)
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is no job
        shards.write(state.tensors, alone=True)
    shards.write_metadata(state.step, state.skipped)
    (folder / STATE_FILE).unlink()
