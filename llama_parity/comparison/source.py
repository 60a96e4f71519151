"""The checkpoint of a comparison: safetensors by the specification's reader, or a GGUF file."""

from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from reference_np.checkpoint import Checkpoint

from ..conversion.file_kinds import is_gguf
from ..conversion.gguf_checkpoint import GgufCheckpoint

Source = Checkpoint | GgufCheckpoint  # parameters by name, read one at a time; config; path


def open_checkpoint(path: str | Path, dtype: DTypeLike = np.float32) -> Source:
    """Open a model directory, a .safetensors file or a GGUF file; InputError as their readers."""
    return GgufCheckpoint(path, dtype) if is_gguf(Path(path)) else Checkpoint(path, dtype)
