"""Write small model files, and training states in their other encoding or with other tensors."""

import warnings
from pathlib import Path

import numpy as np

import llama_torch
import reference_np.config
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.shards import StateShards
from llama_torch.checkpoint.state_interface import TrainingState
from llama_torch.checkpoint.training_state import load_state
from reference_np.config import LlamaConfig

from ..backends.torch_model import save_numpy
from ..conformance.strategies import Array, cast, random_params

ERRORS = (llama_torch.InputError, reference_np.config.InputError)
CONFIG = LlamaConfig(8, 2, 4, 2, 4, 12, 20)


def to_shards(folder: Path, state: TrainingState | None = None) -> None:
    """Put shards in the place of a checkpoint's one file, with its state or another one."""
    state = state or load_state(folder)
    shards = StateShards(folder)
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is no job
        shards.write(state.tensors, alone=True)
    shards.write_metadata(state.step, state.skipped)
    (folder / STATE_FILE).unlink()


def write_model_file(path: Path, config: LlamaConfig = CONFIG, **changes: Array | None) -> Path:
    """Write a model in one file, with some tensors replaced or (None) left out."""
    tensors = cast(random_params(config, 0), np.float32)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_numpy(tensors, path, {"config": config.to_json()})
    return path
