"""The models of the golden vectors: small architectures with weights from integer arithmetic."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.naming import EMBED, LM_HEAD, parameter_shapes
from reference_np.ops import Array

Params = dict[str, Array]


class Model(NamedTuple):
    """An architecture, its float32 parameters by Hugging Face's names, and a sentence about it."""

    name: str
    config: LlamaConfig
    params: Params
    about: str


def random_integers(seed: str, count: int, below: int) -> Array:
    """Return ``count`` integers in [0, below), the same on every machine (SplitMix64)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(crc32(seed.encode()))) * step
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(below)).astype(np.int64)


def random_weight(seed: str, shape: tuple[int, ...], bits: int = 7) -> Array:
    """Return float32 multiples of a power of two with ``bits`` significant bits.

    They are all within a float16 and, up to 7 bits, within a bfloat16. A matrix [out, in] keeps the
    size of its input; a vector, a norm's weight, is spread around one.
    """
    half = 1 << (bits - 1)
    # Two uniform numbers added: a triangle, whose standard deviation is half / sqrt(6).
    sums = random_integers(seed, 2 * math.prod(shape), half).reshape(2, *shape).sum(axis=0)
    centred = (sums - half + 1).astype(np.float32)
    if len(shape) == 1:
        return np.float32(1) + centred / np.float32(2 * half)
    exponent = round(math.log2(2.4 / math.sqrt(shape[1])))
    return centred * np.float32(2.0**exponent / half)


def random_params(name: str, config: LlamaConfig, bits: int = 7) -> Params:
    """Return random parameters; the embedding's elements are of size one."""
    params = {}
    for key, shape in parameter_shapes(config).items():
        weight = random_weight(f"{name}/{key}", shape, bits)
        # Sharper attention than that of average weights, so that its bugs are seen.
        larger = "q_proj" in key or "k_proj" in key
        params[key] = weight * np.float32(2 if larger else 1)
    params[EMBED] = params[EMBED] * np.float32(2)
    return params


def identity_params(config: LlamaConfig) -> Params:
    """Return matrices that are the identity, or as much of it as fits, and norm weights of one.

    The rows of the embedding are those of the identity too, but row v is scaled by v + 1.
    """
    params: Params = {}
    for key, shape in parameter_shapes(config).items():
        params[key] = np.ones(shape, np.float32) if len(shape) == 1 else np.eye(*shape, dtype="f4")
    rows = np.arange(1, config.vocab_size + 1, dtype=np.float32)[:, None]
    params[EMBED] = params[EMBED] * rows
    return params


def shifted_params(config: LlamaConfig, *parts: str) -> Params:
    """Return the identity's parameters, but the named matrices shift their input by one channel.

    A transposed matrix shifts to the other side.
    """
    params = identity_params(config)
    for key, value in params.items():
        if any(part in key for part in parts):
            params[key] = np.roll(value, 1, axis=0)
    return params


SMALL = LlamaConfig(16, 1, 4, 2, 4, 24, 32, max_seq_len=64)
# Every epsilon but those of the two models that say so is a float32 number.
FLOAT32_EPSILON = float(np.float32(1e-5))
SMALL = replace(SMALL, norm_eps=FLOAT32_EPSILON)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
}


def _with_outliers(name: str, config: LlamaConfig) -> Params:
    params = random_params(name, config)
    params[EMBED][:, 3] *= np.float32(64)
    params[EMBED][:, 7] *= np.float32(-32)
    return params


def _faint(name: str, config: LlamaConfig) -> Params:
    params = random_params(name, config)
    return params | {EMBED: params[EMBED] * np.float32(2.0**-8)}


def _full_float32(name: str, config: LlamaConfig) -> Params:
    params = random_params(name, config, bits=24)
    return {key: np.asarray(value, np.float32) for key, value in params.items()}


def _flat_norms(name: str, config: LlamaConfig) -> Params:
    """Return norm weights of one, so that a port that ignores them is right here alone."""
    params = random_params(name, config)
    return {k: np.ones_like(v) if v.ndim == 1 else v for k, v in params.items()}


Maker = Callable[[str, LlamaConfig], Params]
# Name -> what differs from SMALL, a sentence, and how its weights are made.
ARCHITECTURES: Mapping[str, tuple[dict[str, Any], str, Maker]] = {
    "gqa": ({}, "two query heads to a key/value head", random_params),
    "mha": ({"n_kv_heads": 4}, "a key/value head for each query head", random_params),
    "mqa": ({"n_kv_heads": 1}, "one key/value head for all", random_params),
    "one-head": ({"n_heads": 1, "n_kv_heads": 1, "head_dim": 16}, "one head", random_params),
    "six-heads": (
        {"dim": 24, "n_heads": 6, "n_kv_heads": 3},
        "six query heads on three: not a power of two",
        random_params,
    ),
    "wide-heads": (
        {"max_seq_len": 512, "head_dim": 8},
        "head_dim is twice dim / n_heads",
        random_params,
    ),
    "narrow-heads": ({"head_dim": 2}, "head_dim is half of dim / n_heads", random_params),
    "uneven-heads": (
        {"dim": 18, "n_heads": 4, "head_dim": 6},
        "n_heads does not divide dim",
        random_params,
    ),
    "tied": ({"tie_embeddings": True}, "the embedding is the head", random_params),
    "tied-mha": (
        {"tie_embeddings": True, "n_kv_heads": 4},
        "tied, a key/value head for each query head",
        random_params,
    ),
    "narrow-ffn": ({"hidden_dim": 10}, "hidden_dim below dim", random_params),
    "square-ffn": ({"hidden_dim": 16}, "hidden_dim equal to dim", random_params),
    "large-vocabulary": ({"vocab_size": 120}, "120 tokens", random_params),
    "two-layers": ({"n_layers": 2}, "two layers", random_params),
    "four-layers": ({"n_layers": 4, "hidden_dim": 16}, "four layers", random_params),
    "dim-32": ({"dim": 32, "n_heads": 4, "head_dim": 8, "hidden_dim": 40}, "dim 32", random_params),
    "dim-64": (
        {"dim": 64, "n_heads": 4, "head_dim": 16, "hidden_dim": 48, "vocab_size": 20},
        "dim 64",
        random_params,
    ),
    "eps-1e-5": ({"norm_eps": 1e-5}, "epsilon 1e-5, which float32 rounds", _faint),
    "eps-1e-6": ({"norm_eps": 1e-6}, "epsilon 1e-6, which float32 rounds", _faint),
    "eps-float32": ({}, "epsilon float32(1e-5), and activations that show it", _faint),
    "eps-large": ({"norm_eps": 2.0**-7}, "epsilon 2^-7", random_params),
    "eps-unusual": (
        {"norm_eps": float(np.float32(3.7e-4))},
        "epsilon float32(3.7e-4)",
        _faint,
    ),
    "theta-500000": ({"rope_theta": 500000.0, "head_dim": 8}, "theta 500,000", random_params),
    "theta-100": ({"rope_theta": 100.0, "head_dim": 8}, "theta 100", random_params),
    "theta-1e6": (
        {"max_seq_len": 32768, "rope_theta": 1e6, "head_dim": 8, "n_kv_heads": 4},
        "theta 1e6",
        random_params,
    ),
    "linear": (
        {"rope_type": "linear", "rope_factor": 2.0, "head_dim": 8},
        "linear scaling by 2",
        random_params,
    ),
    "linear-2.5": (
        {
            "max_seq_len": 32768,
            "rope_type": "linear",
            "rope_factor": 2.5,
            "head_dim": 8,
            "n_kv_heads": 4,
        },
        "linear scaling by 2.5",
        random_params,
    ),
    "llama3": (
        {
            "max_seq_len": 256,
            **LLAMA3,
            "rope_original_max_seq_len": 64,
            "head_dim": 16,
            "rope_theta": 10000.0,
        },
        "llama3 scaling of a context of 64: frequencies kept, between and divided",
        random_params,
    ),
    "llama3-released": (
        {
            "max_seq_len": 131072,
            **LLAMA3,
            "rope_original_max_seq_len": 8192,
            "head_dim": 16,
            "rope_theta": 500000.0,
        },
        "llama3 scaling with the released numbers, factor 8",
        random_params,
    ),
    "llama3-unusual": (
        {
            "max_seq_len": 512,
            **LLAMA3,
            "rope_factor": 5.0,
            "rope_low_freq_factor": 1.5,
            "rope_high_freq_factor": 6.0,
            "rope_original_max_seq_len": 100,
            "head_dim": 16,
        },
        "llama3 scaling with factors 5, 1.5 and 6 of a context of 100",
        random_params,
    ),
    "short-context": ({"max_seq_len": 16}, "16 positions", random_params),
    "long-context": ({"max_seq_len": 131072, "head_dim": 8}, "131,072 positions", random_params),
    "float32-weights": ({}, "weights of 24 bits, which bfloat16 rounds", _full_float32),
    "outliers": ({}, "two channels 64 and 32 times the others", _with_outliers),
    "flat-norms": ({}, "norm weights of one", _flat_norms),
    "trained": (
        {"hidden_dim": 16, "vocab_size": 20},
        "the model of the training cases",
        random_params,
    ),
    "trained-mha": (
        {"hidden_dim": 16, "vocab_size": 20, "n_kv_heads": 4},
        "the same with a key/value head for each query head",
        random_params,
    ),
    "trained-mqa": (
        {"hidden_dim": 16, "vocab_size": 20, "n_kv_heads": 1},
        "the same with one key/value head",
        random_params,
    ),
    "trained-tied": (
        {"hidden_dim": 16, "vocab_size": 20, "tie_embeddings": True},
        "the same, tied",
        random_params,
    ),
    "trained-two-layers": (
        {"hidden_dim": 16, "vocab_size": 20, "n_layers": 2},
        "the same with two layers",
        random_params,
    ),
}

# Models whose results can be checked by eye: one head, and each matrix the identity.
PLAIN = replace(SMALL, n_heads=1, n_kv_heads=1, head_dim=16, hidden_dim=16, vocab_size=16)
BASICS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "identity": ((), "every matrix the identity"),
    "shifted-attention": (
        ("v_proj", "o_proj"),
        "v_proj and o_proj shift by a channel: transposed, they shift back",
    ),
    "shifted-queries": (("q_proj",), "q_proj shifts by a channel"),
    "shifted-keys": (("k_proj",), "k_proj shifts by a channel"),
    "shifted-ffn": (
        ("gate_proj", "up_proj", "down_proj"),
        "the feed-forward's matrices shift by a channel",
    ),
    "shifted-head": ((LM_HEAD,), "lm_head shifts by a channel: it is no embedding"),
}


def all_models() -> dict[str, Model]:
    """Return every model by its name."""
    found = {}
    for name, (parts, about) in BASICS.items():
        found[name] = Model(name, PLAIN, shifted_params(PLAIN, *parts), about)
    for name, (changed, about, make) in ARCHITECTURES.items():
        config = replace(SMALL, **changed)
        found[name] = Model(name, config, make(name, config), about)
    return found
