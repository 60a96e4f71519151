"""Reading of safetensors files, as a lazy mapping from parameter name to array."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16, which safetensors then hands to NumPy)
import numpy as np
from numpy.typing import DTypeLike

from .config import InputError, LlamaConfig
from .naming import (
    DERIVED_SUFFIX,
    EMBED,
    LM_HEAD,
    SCORE,
    layer_shapes,
    named_shapes,
    outer_shapes,
    parameter_shape,
)
from .ops import Array
from .weight_files import Header, load_json, parse_json, weight_files

SHOWN = 3  # tensors that a message names, of each kind of problem

STORED = {"F16", "BF16", "F32", "F64"}


class Checkpoint(Mapping[str, Array]):
    """Parameters of one safetensors file or a (sharded) directory, read one at a time.

    Every access reads the tensor from disk and converts it to ``dtype`` (float32 or
    float64), without a cache. ``config`` comes from the file's metadata, else from
    ``config.json`` beside it; where both exist they must agree.

    Raises InputError for a file that is missing, truncated or not safetensors, and for
    tensors that are missing, extra or misshapen (all named at once).
    """

    def __init__(self, path: str | Path, dtype: DTypeLike = np.float32) -> None:
        self.path = Path(path)
        if not str(path):
            raise InputError("'' names no checkpoint; give a .safetensors file or its directory")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise InputError(f"the oracle computes in float32 or float64, not {self.dtype}")
        self._files = {path.name: Header(path) for path in weight_files(self.path)}
        self._headers = self._find_tensors()
        self.config = _read_config(self.path, self._files)
        if self.config.tie_embeddings and {EMBED, LM_HEAD} <= self._headers.keys():
            self._drop_tied_head()
        elif self.config.tie_embeddings and LM_HEAD in self._headers:
            self._headers[EMBED] = self._headers.pop(LM_HEAD)  # the tied tensor, stored as the head
        self._check_shapes()

    def __getitem__(self, name: str) -> Array:
        tensor = self._headers[name].read(name)
        return tensor.astype(self.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    @property
    def files(self) -> list[Path]:
        """The files that the tensors are read from."""
        return [header.path for header in self._files.values()]

    def _find_tensors(self) -> dict[str, Header]:
        headers: dict[str, Header] = {}
        for header in self._files.values():
            for name in header.shapes:
                if name in headers:
                    raise InputError(
                        f"{header.path}: {name} is also in {headers[name].path.name}; keep one"
                    )
                if not name.endswith(DERIVED_SUFFIX):
                    headers[name] = header
        return headers

    def _drop_tied_head(self) -> None:
        head = self._headers.pop(LM_HEAD)
        if not np.array_equal(head.read(LM_HEAD), self._headers[EMBED].read(EMBED)):
            raise InputError(
                f"{head.path}: {LM_HEAD} is not the embedding although tie_word_embeddings is "
                "true; remove it, or set that to false"
            )

    def _describe_mismatch(self, found: Mapping[str, tuple[int, ...]]) -> list[str]:
        if SCORE in found:
            raise InputError(
                f"{self.path}: is a reward model, which scores answers and writes none ({SCORE} is "
                "its head); give a language model's directory"
            )
        return describe_mismatch(self.config, found)

    def _check_shapes(self) -> None:
        found = {name: header.shape(name) for name, header in self._headers.items()}
        dtypes = {
            name: header.dtypes[header.stored_name(name)] for name, header in self._headers.items()
        }
        problems = self._describe_mismatch(found)
        odd = [f"{name} is stored as {d}" for name, d in dtypes.items() if d not in STORED]
        problems += [*odd[:SHOWN], *_count_rest(len(odd), "stored as no float")]
        if problems:
            raise InputError(f"{self.path}: does not fit its config: {'; '.join(problems)}")


class RewardCheckpoint(Checkpoint):
    """Parameters of a reward model: a Llama's without its head, and the scalar head score.weight.

    ``config`` is the trunk's; a tied head that it may claim is none of this model. Raises
    InputError as Checkpoint does, and for a language model.
    """

    def _describe_mismatch(self, found: Mapping[str, tuple[int, ...]]) -> list[str]:
        if SCORE not in found:
            raise InputError(
                f"{self.path}: is no reward model, which has a head {SCORE}; give the directory of "
                "one, as python -m llama_torch.reward trains it"
            )
        trunk = {name: shape for name, shape in found.items() if name != SCORE}
        expected = (1, self.config.dim)
        wrong = f"{SCORE} is {list(found[SCORE])} and should be {list(expected)}"
        problems = describe_mismatch(replace(self.config, tie_embeddings=True), trunk)
        return [*problems, *([] if found[SCORE] == expected else [wrong])]


def describe_mismatch(config: LlamaConfig, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return phrases for the tensors that are missing, extra or of another shape.

    Of each kind the first few are named and the rest counted. A config may claim any number of
    layers: their names are made one by one, no more of them than ``found`` has and a few.
    """
    expected = {name: parameter_shape(config, name) for name in found}
    missing = (name for name, _ in named_shapes(config) if name not in found)
    extra = [name for name, shape in expected.items() if shape is None]
    n_known = len(found) - len(extra)
    n_missing = len(outer_shapes(config)) + config.n_layers * len(layer_shapes(config)) - n_known
    misshapen = [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if shape is not None and found[name] != shape
    ]
    return [
        *(f"{name} is missing" for name in islice(missing, SHOWN)),
        *_count_rest(n_missing, "missing"),
        *(f"{name} is not a parameter of it" for name in extra[:SHOWN]),
        *_count_rest(len(extra), "not parameters of it"),
        *misshapen[:SHOWN],
        *_count_rest(len(misshapen), "of another shape"),
    ]


def _count_rest(count: int, kind: str) -> list[str]:
    """Return a phrase for the tensors of one kind beyond those named, if there are any."""
    return [f"{count - SHOWN:,} more are {kind}"] if count > SHOWN else []


def _read_config(path: Path, files: Mapping[str, Header]) -> LlamaConfig:
    beside = (path if path.is_dir() else path.parent) / "config.json"
    found = {str(beside): load_json(beside)} if beside.is_file() else {}
    for file in files.values():
        if "config" in file.metadata:
            source = f"{file.path} (metadata)"
            found[source] = parse_json(file.metadata["config"], source)
    if not found:
        raise InputError(f"{beside}: no such file, and {path} carries no config; put it there")
    configs = {source: LlamaConfig.from_hf(hf, source) for source, hf in found.items()}
    first, config = next(iter(configs.items()))
    for source, other in configs.items():
        if other != config:
            raise InputError(f"{first}: contradicts the config stored in {source}; keep one")
    return config
