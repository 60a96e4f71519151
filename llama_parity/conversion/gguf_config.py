"""A model's config from a GGUF file's metadata, and the metadata of a config.

The keys are llama.cpp's for the architecture ``llama``. Its scaled rotary frequencies of Llama 3
are no keys but the tensor ``rope_freqs.weight`` [K / 2]: what each frequency is divided by.
"""

import dataclasses
import math
from typing import Any, TypeVar

import numpy as np

from llama_common.errors import InputError
from llama_common.files import parse_json
from reference_np.config import LlamaConfig
from reference_np.ops import Array, rope_frequencies

from .gguf_file import GgufFile, shown

PREFIX = "llama."
ROPE_FREQS, OUTPUT, EMBEDDING = "rope_freqs.weight", "output.weight", "token_embd.weight"
# The config as its maker's config.json said it: what the keys have no place for.
OWN_CONFIG = "llama_parity.config"

INTEGERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
EPSILON, KV_HEADS, BASE = (
    *("attention.layer_norm_rms_epsilon", "attention.head_count_kv"),
    "rope.freq_base",
)
HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
SCALING, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
ORIGINAL = "rope.scaling.original_context_length"
INERT = ("tensor_data_layout", "rope.scaling.finetuned")
# With one of these values the model is no other: 0.0 stands for no factor, as in llama.cpp.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0.0, 1.0)),
    **{"attention.scale": (0.0,), "attention.causal": (True,), "rope.scaling.attn_factor": (1.0,)},
}
# One number, or one for each layer.
PER_LAYER = ("feed_forward_length", "attention.head_count", KV_HEADS)
KNOWN = {
    *INTEGERS,
    *(EPSILON, KV_HEADS, BASE, *HEAD_DIM, SCALING, FACTOR, OLD_FACTOR, ORIGINAL, "vocab_size"),
    *(*INERT, *NEUTRAL),
}

# Llama 3.1's and its successors': low and high, and the context that they were trained on.
LOW, HIGH, TRAINED = 1.0, 4.0, 8192
# Of the divisors, where a converter computed them in float32, and where this one did.
THEIRS, OURS = 1e-4, 1e-6
N = TypeVar("N", int, float)


def read_config(file: GgufFile, rope_freqs: Array | None) -> dict[str, Any]:
    """Return the keys of a config.json that a file's metadata and tensors say.

    Raises InputError for another architecture and for every key that is missing, unusable or
    unknown, by name.
    """
    _require_whole(file)
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        said = "is missing" if architecture is None else f"is {shown(architecture)}"
        raise InputError(f"{file.path}: general.architecture {said}; only llama is read")
    given = [key.removeprefix(PREFIX) for key in file.metadata if key.startswith(PREFIX)]
    unknown = [key for key in given if key not in KNOWN or not _is_neutral(file, key)]
    if unknown:
        named = [f"{PREFIX}{key}={shown(file.metadata[PREFIX + key])}" for key in unknown[:4]]
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise InputError(f"{file.path}: not supported: {', '.join(named)}{more}")
    hf = _plain(file)
    theirs = LlamaConfig.from_hf(hf | _scaling(file, hf, rope_freqs), str(file.path))
    own = file.get(OWN_CONFIG, str)
    return theirs.to_hf() if own is None else _agreed(file, own, theirs, rope_freqs).to_hf()


def _require_whole(file: GgufFile) -> None:
    """Raise InputError for one part of several, of which only the first has the model's keys."""
    parts, number = file.get("split.count", int), file.get("split.no", int)
    if parts not in (None, 0, 1):
        which = f"one of {parts} parts" if number is None else f"part {number + 1} of {parts}"
        raise InputError(f"{file.path}: is {which}; join them first: llama-gguf-split --merge")


def _is_neutral(file: GgufFile, key: str) -> bool:
    """Return whether a key's value changes nothing; True of a key that may have any."""
    values = NEUTRAL.get(key)
    return values is None or file.get(PREFIX + key, type(values[0])) in values


def _plain(file: GgufFile) -> dict[str, Any]:
    """Return the keys of a config.json but for those of the rotary scaling."""
    n_layers = _positive(file, "block_count", int)

    def number(key: str, default: int | None = None) -> int:
        if key in PER_LAYER and isinstance(file.metadata.get(PREFIX + key), np.ndarray):
            return _equal(file, key, n_layers)
        return _positive(file, key, int, default)

    hf: dict[str, Any] = {ours: number(key) for key, ours in INTEGERS.items()}
    heads, dim = hf["num_attention_heads"], hf["hidden_size"]
    hf["num_key_value_heads"] = number(KV_HEADS, heads)
    hf["rms_norm_eps"] = _positive(file, EPSILON, float)
    hf["rope_theta"] = _positive(file, BASE, float, 10000.0)
    sizes = {key: number(key) for key in HEAD_DIM if PREFIX + key in file.metadata}
    # As llama.cpp: the heads' size unless said, which turns as a whole.
    sizes |= {} if HEAD_DIM[0] in sizes else {"embedding_length": dim // heads}
    if len(set(sizes.values())) != 1:
        said = ", ".join(f"{PREFIX}{key} {size}" for key, size in sizes.items())
        raise InputError(f"{file.path}: heads of several sizes are not supported: {said}")
    hf["head_dim"] = next(iter(sizes.values()))
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None:
        raise InputError(f"{file.path}: holds no {EMBEDDING}; give a whole model")
    rows = embedding.shape[0]
    if number("vocab_size", rows) != rows:
        raise InputError(f"{file.path}: llama.vocab_size is not {rows}, {EMBEDDING}'s rows")
    tied = OUTPUT not in file.tensors
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return hf | {"vocab_size": rows, "tie_word_embeddings": tied, **kind}


def _positive(file: GgufFile, key: str, wanted: type[N], default: N | None = None) -> N:
    """Return a number of the metadata; InputError where it is missing or not positive."""
    value = file.get(PREFIX + key, wanted)
    return _require_positive(file, key, default if value is None else value)


def _require_positive(file: GgufFile, key: str, value: N | None) -> N:
    if value is None or not 0 < value < math.inf:
        said = "is missing" if value is None else f"is {value!r}"
        raise InputError(f"{file.path}: {PREFIX}{key} {said}; a positive number is needed")
    return value


def _equal(file: GgufFile, key: str, n_layers: int) -> int:
    """Return the one number of a list with a number for each layer."""
    numbers = sorted(set(file.get_list(PREFIX + key, int, n_layers) or ()))
    if len(numbers) > 1:
        raise InputError(
            f"{file.path}: {PREFIX}{key} is {numbers[0]} to {numbers[-1]} by layer; layers that "
            "differ are not supported"
        )
    return _require_positive(file, key, numbers[0])


def _scaling(file: GgufFile, hf: dict[str, Any], rope_freqs: Array | None) -> dict[str, Any]:
    """Return rope_scaling of a config.json, by the keys or by the divisors of Llama 3."""
    kind = file.get(PREFIX + SCALING, str)
    key = FACTOR if PREFIX + FACTOR in file.metadata else OLD_FACTOR
    factor = file.get(PREFIX + key, float)
    if kind is None:
        kind = "none" if factor is None else "linear"
    if kind not in ("none", "linear"):
        raise InputError(
            f"{file.path}: {PREFIX}{SCALING} {shown(kind)} is not supported: linear and Llama 3's "
            "are"
        )
    if kind == "linear" and factor not in (None, 0.0, 1.0):
        _require_positive(file, key, factor)
        if rope_freqs is not None:
            raise InputError(f"{file.path}: has linear scaling and {ROPE_FREQS}; not supported")
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if rope_freqs is None or np.all(rope_freqs == 1):
        return {}
    if OWN_CONFIG in file.metadata:  # which is checked against them
        return {}
    return _llama3(file, hf, rope_freqs)


def _llama3(file: GgufFile, hf: dict[str, Any], rope_freqs: Array) -> dict[str, Any]:
    """Return the scaling that gives these divisors, with the released models' low and high."""
    _require_half(file, hf["head_dim"], rope_freqs)
    for trained in dict.fromkeys((_positive(file, ORIGINAL, int, TRAINED), TRAINED)):
        rope = {"rope_type": "llama3", "low_freq_factor": LOW, "high_freq_factor": HIGH}
        rope["original_max_position_embeddings"] = trained
        # Any factor, to see how much of the slowest frequency is kept: 1 / d = g + (1 - g) / f.
        probe = LlamaConfig.from_hf(hf | {"rope_scaling": rope | {"factor": 2.0}}, str(file.path))
        kept = 2 / divisors(probe)[-1] - 1
        inverse = (1 / float(rope_freqs[-1]) - kept) / (1 - kept) if kept < 1 else 0.0
        if not 1e-6 < inverse < 1e6:
            continue
        rope["factor"] = float(f"{1 / inverse:.5g}")
        config = LlamaConfig.from_hf(hf | {"rope_scaling": rope}, str(file.path))
        if _agree(rope_freqs, divisors(config), THEIRS):
            return {"rope_scaling": rope}
    raise InputError(
        f"{file.path}: {ROPE_FREQS} is not Llama 3's scaling (low {LOW:g}, high {HIGH:g}, "
        f"context {TRAINED}); others are not supported"
    )


def _require_half(file: GgufFile, head_dim: int, rope_freqs: Array) -> None:
    """Raise InputError unless there is a divisor for each frequency, before any is computed."""
    if rope_freqs.shape != (head_dim // 2,):
        raise InputError(
            f"{file.path}: {ROPE_FREQS} has {rope_freqs.size} numbers and head_dim is {head_dim}; "
            "convert it anew"
        )


def divisors(config: LlamaConfig) -> Array:
    """Return what the scaling divides each rotary frequency by, float64 [K / 2]."""
    plain = rope_frequencies(dataclasses.replace(config, rope_type="default"))
    found: Array = plain / rope_frequencies(config)
    return found


def _agree(found: Array, expected: Array, bound: float) -> bool:
    return found.shape == expected.shape and np.allclose(found, expected, rtol=bound, atol=0)


def _agreed(
    file: GgufFile, text: str, theirs: LlamaConfig, rope_freqs: Array | None
) -> LlamaConfig:
    """Return the config that the file states as JSON; InputError where its keys say another."""
    source = f"{file.path} ({OWN_CONFIG})"
    own = LlamaConfig.from_hf(parse_json(text, source), source)
    rope = [field.name for field in dataclasses.fields(own) if field.name.startswith("rope_")]
    names = [field.name for field in dataclasses.fields(own) if field.name not in rope]
    names += ["rope_theta"]
    wrong = [name for name in names if not _same(getattr(own, name), getattr(theirs, name))]
    if own.rope_type == "llama3" and rope_freqs is not None and not wrong:
        _require_half(file, own.head_dim, rope_freqs)
        wrong += [] if _agree(rope_freqs, divisors(own), OURS) else [ROPE_FREQS]
    elif own.rope_type == "llama3" or (rope_freqs is not None and np.any(rope_freqs != 1)):
        wrong += [ROPE_FREQS]
    linear = [c.rope_factor if c.rope_type == "linear" else 1.0 for c in (own, theirs)]
    wrong += [] if _same(*linear) else ["the linear factor"]
    if wrong:
        raise InputError(f"{source}: contradicts the file's own {', '.join(wrong)}; keep one")
    return own


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float):
        return bool(abs(left - right) <= 2.0**-23 * abs(left))
    return bool(left == right)


def stored_metadata(config: LlamaConfig) -> dict[str, int | float | str]:
    """Return the metadata of a config by llama.cpp's keys; floats are stored in single precision.

    Raises InputError where a value is no number of that precision.
    """
    hf = config.to_hf()
    found: dict[str, Any] = {key: hf[ours] for key, ours in INTEGERS.items()}
    found |= {KV_HEADS: config.n_kv_heads, EPSILON: float(config.norm_eps)}
    found |= {BASE: float(config.rope_theta), "vocab_size": config.vocab_size}
    found |= dict.fromkeys(HEAD_DIM, config.head_dim)
    if config.rope_type == "linear":
        found |= {SCALING: "linear", FACTOR: float(config.rope_factor)}
    for key, value in found.items():
        if isinstance(value, float) and not 2.0**-126 <= value < 2.0**127:
            raise InputError(f"{PREFIX}{key} {value!r} is no number of GGUF's single precision")
    return {f"{PREFIX}{key}": value for key, value in found.items()} | {
        OWN_CONFIG: config.to_json()
    }
