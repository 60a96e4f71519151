"""Ports that read a model directory: an honest reader, and readers with one planted bug each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.ops import Array


class Reader:
    """The oracle behind a reader of its own; it has no ``logits`` for mapped weights."""

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        folder = Path(path)
        config = self.config(json.loads((folder / "config.json").read_text()))
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        stored = {n: self.number(v) for n, v in self.tensors(folder).items()}
        params = {n: v.astype(kind).astype(np.float64) for n, v in stored.items()}
        if config.tie_embeddings:
            params.pop("lm_head.weight", None)
        return lambda tokens: forward(params, tokens, config)[0]

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return LlamaConfig.from_hf(hf)

    def tensors(self, folder: Path) -> dict[str, Array]:
        files = sorted(folder.glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}

    def number(self, value: Array) -> Array:
        return value


class FirstShardAlone(Reader):
    """Reads the first of the files alone."""

    def tensors(self, folder: Path) -> dict[str, Array]:
        return load_file(min(folder.glob("*.safetensors")))


class Bfloat16TakenForFloat16(Reader):
    """Reads the bits of bfloat16 as float16's."""

    def number(self, value: Array) -> Array:
        return value.view(np.float16) if value.dtype == ml_dtypes.bfloat16 else value


class Fixed(Reader):
    """A reader that does not read some fields; ``fixed`` are their values."""

    fixed: Mapping[str, Any]

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return replace(super().config(hf), **self.fixed)


class FixedEpsilon(Fixed):
    """Leaves rms_norm_eps unread."""

    fixed: Mapping[str, Any] = {"norm_eps": 1e-5}


class FixedSmallEpsilon(Fixed):
    """Leaves rms_norm_eps unread; its own is near the usual one."""

    fixed: Mapping[str, Any] = {"norm_eps": 1e-6}


class FixedLowFactor(Fixed):
    """Leaves low_freq_factor unread."""

    fixed: Mapping[str, Any] = {"rope_low_freq_factor": 1.0}


class FixedOriginalContext(Fixed):
    """Leaves original_max_position_embeddings unread."""

    fixed: Mapping[str, Any] = {"rope_original_max_seq_len": 8192}


class ScalingUnread(Fixed):
    """Leaves every rotary scaling unread."""

    fixed: Mapping[str, Any] = {"rope_type": "default"}


class NewPlaceUnread(Reader):
    """Reads config.json as transformers 4 writes it."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config({key: hf[key] for key in hf if key != "rope_parameters"})


class OldTypeUnread(Reader):
    """Leaves a rope_scaling unread that names its kind as ``type``."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        scaling = hf.get("rope_scaling") or {}
        return super().config(dict(hf) | ({"rope_scaling": None} if "type" in scaling else {}))


class HeadDimDerived(Reader):
    """Leaves head_dim unread."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"head_dim": None})


class AlwaysTied(Reader):
    """Leaves tie_word_embeddings unread: the embedding is the head."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"tie_word_embeddings": True})


class TiedByDefault(Reader):
    """Ties the embeddings where tie_word_embeddings is left out."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config({"tie_word_embeddings": True} | dict(hf))


class NeverTied(Reader):
    """Leaves tie_word_embeddings unread: the file must have a head."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"tie_word_embeddings": False})


class KeyHeadsUnread(Reader):
    """Leaves num_key_value_heads unread."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"num_key_value_heads": None})


class HeadsFixed(Reader):
    """Leaves num_attention_heads and head_dim unread, as one size of a model has them."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        return replace(config, n_heads=2, n_kv_heads=2, head_dim=config.dim // 2)


class HeadDimRequired(Reader):
    """Fails where head_dim is left out."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        return super().config(dict(hf) | {"head_dim": hf["head_dim"]})


class BaseLostWithLinear(Reader):
    """Has the usual rotary base wherever scaling is linear."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        return replace(config, rope_theta=1e4) if config.rope_type == "linear" else config


class BaseOfOldPlace(Reader):
    """Reads scaling in the place of transformers 5, and the base in that of transformers 4."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        if place := hf.get("rope_parameters"):
            hf = dict(hf) | {"rope_parameters": dict(place) | {"rope_theta": 1e4}}
        return super().config(hf)


class OriginalOfMaximum(Reader):
    """Takes max_position_embeddings for the context before scaling."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        return replace(config, rope_original_max_seq_len=config.max_seq_len)


class EveryScalingLinear(Reader):
    """Divides every frequency by the factor, whatever the kind of scaling."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        return replace(config, rope_type="linear") if config.rope_type == "llama3" else config


class IntegerFactors(Reader):
    """Holds the numbers of scaling as integers."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        names = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
        return replace(config, **{name: float(int(getattr(config, name))) for name in names})


class SquareHeadTransposed(Reader):
    """Transposes the head where its shape allows it."""

    def tensors(self, folder: Path) -> dict[str, Array]:
        found = super().tensors(folder)
        head = found.get("lm_head.weight")
        if head is not None and head.shape[0] == head.shape[1]:
            found["lm_head.weight"] = head.T
        return found


class LayersSortedAsText(Reader):
    """Numbers the layers in the order of their names: 0, 1, 10, 2."""

    def tensors(self, folder: Path) -> dict[str, Array]:
        found = super().tensors(folder)
        layers = sorted({name.split(".")[2] for name in found if ".layers." in name})
        numbers = {f".layers.{layer}.": f".layers.{i}." for i, layer in enumerate(layers)}
        return {self.renamed(name, numbers): value for name, value in found.items()}

    def renamed(self, name: str, numbers: Mapping[str, str]) -> str:
        for old, new in numbers.items():
            if old in name:
                return name.replace(old, new)
        return name


class HeadDimOfKeyHeads(Reader):
    """Derives a head_dim that is left out from the number of key/value heads."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        heads = hf.get("num_key_value_heads") or hf["num_attention_heads"]
        derived = {} if hf.get("head_dim") else {"head_dim": hf["hidden_size"] // heads}
        return super().config(dict(hf) | derived)


class SmallEpsilonAndHeadDimRequired(FixedSmallEpsilon, HeadDimRequired):
    """Has two bugs, one of which shows in every directory."""


class NormsPlusOne(Reader):
    """Adds one to the norms' weights, as another architecture does."""

    def tensors(self, folder: Path) -> dict[str, Array]:
        found = super().tensors(folder)
        return {name: value + ("norm" in name) for name, value in found.items()}


class NullRefused(Reader):
    """Fails on keys that are null where they may be."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        heads = hf.get("num_key_value_heads", hf["num_attention_heads"])
        if heads * (hf["num_attention_heads"] // heads) != hf["num_attention_heads"]:
            raise ValueError("heads")
        return super().config(hf)


class Selective(Reader):
    """Refuses grouped queries in its own file, which is not covered."""

    def config(self, hf: Mapping[str, Any]) -> LlamaConfig:
        config = super().config(hf)
        if config.n_kv_heads != config.n_heads:
            raise NotImplementedError("grouped queries")
        return config
