"""Convert between a Hugging Face directory and a GGUF file."""

from functools import partial
from pathlib import Path

import torch

from llama_common.files import atomic_write
from llama_common.notes import note
from llama_torch.model.config import ModelConfig

from . import token_ids
from .gguf_checkpoint import GgufCheckpoint
from .gguf_model import model_of, require_library, write_gguf
from .gguf_tokenizer import vocabulary_of
from .gguf_vocabulary import token_ids_of, tokenizer_files
from .hf_checkpoint import read_hf, write_hf
from .lazy_weights import Model, Weight, label, write_file
from .token_ids import TokenIds


def from_gguf(
    source: Path,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_gb: float,
    bos: int,
    eos: tuple[int, ...],
) -> ModelConfig:
    """Write a GGUF file's model into a folder, with its tokenizer; return its config."""
    checkpoint = GgufCheckpoint(source)
    model, file = model_of(checkpoint), checkpoint.file
    size = model.config.vocab_size
    flagged = token_ids.ids_of_flags(bos, eos, size)
    ids: TokenIds = token_ids_of(file, size, flagged) | flagged
    for name, content in tokenizer_files(file, size, model.config.max_seq_len).items():
        write_file(folder / name, partial(Path.write_bytes, data=content))
    written = with_vectors_as_matrices(model, source) if dtype is None else model
    write_hf(folder, written, dtype, max_shard_gb, ids)
    if ids:
        token_ids.write_generation_config(folder, ids, flagged)
    return model.config


def with_vectors_as_matrices(model: Model, source: Path) -> Model:
    """Return the model with its vectors, F32 in GGUF, in its matrices' dtype.

    Those that this dtype does not hold exactly leave all as they are, which is noted.
    """
    dtype = model.dtype
    vectors = {name: w for name, w in model.weights.items() if len(w.shape) == 1}
    for name, vector in vectors.items():
        wide = vector.read()
        if not torch.equal(wide.to(dtype).to(wide.dtype), wide):
            note(
                f"{source}: {name} does not fit {label(dtype)}, the matrices' dtype, exactly: the "
                f"vectors stay {label(vector.dtype)}, and a program that loads the model in the "
                "dtype of config.json rounds them"
            )
            return model
    narrowed = {
        name: Weight(vector.shape, dtype, partial(_read_as, vector, dtype))
        for name, vector in vectors.items()
    }
    return Model(model.config, model.weights | narrowed)


def _read_as(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return weight.read().to(dtype)


def to_gguf(
    source: Path, target: Path, dtype: torch.dtype | None, bos: int, eos: tuple[int, ...]
) -> ModelConfig:
    """Write a GGUF file of a Hugging Face model and its tokenizer; return its config."""
    require_library()
    model = read_hf(source)
    size, beside = model.config.vocab_size, source if source.is_dir() else source.parent
    flagged = token_ids.ids_of_flags(bos, eos, size)
    ids = token_ids.complete_ids(
        token_ids.ids_of_files(beside, size), beside, model.config, by_size=False
    )
    vocabulary = vocabulary_of(beside, size, ids, flagged)
    atomic_write(target, lambda path: write_gguf(path, model, dtype, vocabulary))
    return model.config
