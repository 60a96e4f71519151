"""Ports that misread what real model directories hold beside the sizes, each with one bug."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from reference_np import ops
from reference_np.config import REQUIRED_VALUES, InputError, LlamaConfig
from reference_np.model import forward
from reference_np.ops import Array

from .toy_loaders import IntegerFactors, Reader

Tensors = dict[str, Array]


class FileReader(Reader):
    """The honest reader, with places for the bugs of a whole directory."""

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        folder = Path(path)
        hf = json.loads((folder / "config.json").read_text())
        config, stored = self.config(hf), self.tensors(folder)
        operations = self.operations(hf, stored)
        params = {
            name: self.weight(hf, name, value).astype(np.dtype(dtype)).astype(np.float64)
            for name, value in stored.items()
        }
        return lambda tokens: forward(
            params, tokens, config, mask=self.mask(hf, tokens), ops=operations
        )[0]

    def weight(self, hf: Mapping[str, Any], name: str, value: Array) -> Array:
        return value

    def mask(self, hf: Mapping[str, Any], tokens: Array) -> Array | None:
        return None

    def operations(self, hf: Mapping[str, Any], stored: Tensors) -> Any:
        return ops


def with_tables(tables: Callable) -> SimpleNamespace:
    return SimpleNamespace(**vars(ops) | {"rope_tables": tables})


class PaddingMasked(FileReader):
    """Masks the tokens of pad_token_id wherever they stand."""

    def mask(self, hf: Mapping[str, Any], tokens: Array) -> Array | None:
        n = tokens.shape[1]
        is_real = tokens != hf.get("pad_token_id", -1)
        return np.tril(np.ones((n, n), bool)) & (is_real[:, None] | np.eye(n, dtype=bool))


class PaddingZeroed(FileReader):
    """Zeroes the embedding of pad_token_id."""

    def weight(self, hf: Mapping[str, Any], name: str, value: Array) -> Array:
        if "embed_tokens" in name and "pad_token_id" in hf:
            value[hf["pad_token_id"]] = 0.0
        return value


class OneEndToken(FileReader):
    """Fails where eos_token_id is a list."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        int(hf["eos_token_id"])
        return super().config(hf)


class BaseMustBeFloat(FileReader):
    """Fails where rope_theta is written as an integer."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        base = (hf.get("rope_parameters") or hf)["rope_theta"]
        if not isinstance(base, float):
            raise TypeError(f"rope_theta: expected a float, got {base!r}")
        return super().config(hf)


class LaterKeysRequired(FileReader):
    """Fails where keys are left out that the first files do not have."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"mlp_bias": hf["mlp_bias"]})


class DtypeOfConfig(FileReader):
    """Casts the tensors to the dtype that config.json names."""

    def weight(self, hf: Mapping[str, Any], name: str, value: Array) -> Array:
        kind = hf.get("dtype") or hf["torch_dtype"]
        return value.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


class HeldInFloat16(FileReader):
    """Holds every 16-bit tensor in float16, in float32 the numbers of bfloat16 too."""

    dtypes = ("float32",)

    def weight(self, hf: Mapping[str, Any], name: str, value: Array) -> Array:
        with np.errstate(over="ignore"):
            return value if value.dtype == np.float32 else value.astype(np.float16)


class StoredFrequencies(FileReader):
    """Takes the rotary frequencies from the file where it has them."""

    def operations(self, hf: Mapping[str, Any], stored: Tensors) -> Any:
        found = [value for name, value in stored.items() if name.endswith("inv_freq")]
        if not found:
            return ops

        def tables(positions: Array, config: LlamaConfig, dtype: Any) -> tuple[Array, Array]:
            angles = positions[..., None] * found[0].astype(np.float64)
            return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)

        return with_tables(tables)


class TableOf2048(FileReader):
    """Has rotary tables of 2,048 rows, of which later positions take the last."""

    def operations(self, hf: Mapping[str, Any], stored: Tensors) -> Any:
        return with_tables(lambda p, *rest: ops.rope_tables(np.minimum(p, 2047), *rest))


class NothingRefused(FileReader):
    """Takes every directory for a plain Llama: it looks at no key that it does not know."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        plain = {key: value for key, value in hf.items() if key not in REQUIRED_VALUES}
        for place in ("rope_scaling", "rope_parameters"):
            rope = plain.get(place) or {}
            if rope.get("rope_type") in ("yarn", "dynamic"):
                theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
                plain[place] = theta or None
        return super().config(plain)


class NothingRefusedAndSmallEpsilon(NothingRefused):
    """As NothingRefused, with a fault in every directory besides."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return replace(super().config(hf), norm_eps=1e-6)


class RefusesByAssertion(FileReader):
    """Refuses what it does not know as reference code does."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        try:
            return super().config(hf)
        except InputError as error:
            raise AssertionError(error) from None


class IntegerFactorsInBfloat16(IntegerFactors):
    """Holds the numbers of scaling as integers, where the tolerance is widest."""

    dtypes = ("bfloat16",)


class NotAFunction(FileReader):
    """Returns the logits' array in place of a function of tokens."""

    def from_directory(self, path: str, dtype: str) -> Any:
        return super().from_directory(path, dtype)(np.zeros((1, 3), np.int64))


class Raises(FileReader):
    """Fails on every directory."""

    def from_directory(self, path: str, dtype: str) -> Any:
        raise KeyError("model.layers.0.attention.wq.weight")
