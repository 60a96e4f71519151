"""Targets of the coverage-guided run: readers of a few formats, each of one file's bytes.

Units to begin with lie in ``corpus/NAME``: valid files, and what earlier runs found.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_common.settings import build, read_toml
from llama_parity.comparison.trace_file import TraceFile
from llama_torch.config import DataConfig, OptimConfig, TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.pieces import read_pieces, with_kinds
from llama_torch.tokenizer.settings import read_settings
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError as OracleInputError
from reference_np.config import LlamaConfig
from reference_np.naming import parameter_shapes
from reference_np.weight_files import load_json

from . import mutations
from .mutations import Mutate
from .outcomes import outcome

CONFIG = LlamaConfig(4, 1, 1, 1, 4, 4, 4, max_seq_len=8, tie_embeddings=True)


class Target(NamedTuple):
    """A reader of one file in a folder, how units of it are mutated, and what stands beside it."""

    file: str
    read: Callable[[Path], Any]
    mutate: Mutate
    package: str = "llama_torch"
    prepare: Callable[[Path], None] = lambda folder: None


def run_unit(target: Target, folder: Path, unit: bytes) -> None:
    """Read a unit; AssertionError unless it is read, or refused in one line, within bounds."""
    path = folder / target.file
    path.unlink(missing_ok=True)
    path.write_bytes(unit)
    outcome(target.read, folder, target.package)


def agreed(ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
    """Return the value of two readers; both may refuse, and AssertionError where they differ."""
    refusals: list[ValueError] = []
    values = []
    for read in (ours, theirs):
        try:
            values.append(read())
        except (InputError, OracleInputError) as error:
            refusals.append(error)
    assert len(values) != 1, f"one reader refuses: {refusals[0]}"
    if refusals:
        raise refusals[0]
    assert values[0] == values[1], f"readers differ: {values}"
    return values[0]


def _config(folder: Path) -> Any:
    path = folder / "config.json"
    return agreed(
        lambda: asdict(ModelConfig.from_hf(read_json(path), str(path))),
        lambda: asdict(LlamaConfig.from_hf(load_json(path), str(path))),
    )


def _header(folder: Path) -> Any:
    return dict(Checkpoint(folder / "model.safetensors"))


def _index(folder: Path) -> Any:
    from llama_torch.checkpoint.hf import load_model  # imports torch

    return agreed(lambda: set(load_model(folder).state_dict()), lambda: set(Checkpoint(folder)))


def _import_torch(folder: Path) -> None:
    """Import the modules that these two readers need: later, it would count as theirs."""
    import llama_torch.checkpoint.hf
    import llama_torch.checkpoint.shard_index  # noqa: F401


def _write_indexed(folder: Path) -> None:
    """Write the files that an index names, and the config."""
    _import_torch(folder)
    tensors = {
        name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(CONFIG).items()
    }
    names = list(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, folder / f"{i}.safetensors")
    (folder / "config.json").write_text(CONFIG.to_json())


def _trace(folder: Path) -> Any:
    trace = TraceFile(folder / "trace.safetensors")
    steps = [trace.read_step(s, "grad.model.norm.weight") for s in range(len(trace.steps))]
    return [trace.read(c, "embed") for c in range(len(trace.calls))], steps, trace.unknown


def _toml(folder: Path) -> Any:
    settings = read_toml(str(folder / "settings.toml"), TrainConfig)
    return [build(part, settings) for part in (DataConfig, ModelConfig, OptimConfig)]


def _tokenizer(folder: Path) -> Any:
    return read_settings(folder)


def _pieces(folder: Path) -> Any:
    path = folder / "tokenizer.model"
    try:
        pieces = read_pieces(path.read_bytes())
        return read_pieces(with_kinds(path.read_bytes(), {0: 3, len(pieces) - 1: 3}))
    except (ValueError, LookupError) as error:  # as its callers do
        raise InputError(f"{path}: {type(error).__name__}") from None


def _shard_index(folder: Path) -> Any:
    from llama_torch.checkpoint.shard_index import read_index  # imports torch

    return read_index(folder)


TARGETS: Mapping[str, Target] = {
    "config": Target("config.json", _config, mutations.mutated_json, "tools"),
    "header": Target("model.safetensors", _header, mutations.mutated_safetensors, "reference_np"),
    "index": Target(
        "model.safetensors.index.json", _index, mutations.mutated_json, "tools", _write_indexed
    ),
    "trace": Target("trace.safetensors", _trace, mutations.mutated_safetensors, "tools"),
    "toml": Target("settings.toml", _toml, mutations.mutated_toml),
    "tokenizer": Target("tokenizer_config.json", _tokenizer, mutations.mutated_json),
    "pieces": Target("tokenizer.model", _pieces, mutations.mutated_bytes),
    "shard_index": Target(
        ".metadata", _shard_index, mutations.mutated_bytes, prepare=_import_torch
    ),
}
