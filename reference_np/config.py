"""The architecture of one model, and its Hugging Face ``config.json`` form."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """Something a user supplied is wrong; the message names it and the remedy."""


# LlamaConfig field -> Hugging Face key. rope_theta has two spellings; see _rope_theta.
HF_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# Keys that would change the result, with the only values that do not.
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
}

# Keys that say how a model is used, stored or reported, and never what it computes.
INERT_KEYS = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "use_return_dict",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Every number that shapes the computation (paper section 2.2 and table 1).

    ``head_dim`` is explicit: it need not equal ``dim / n_heads``. ``n_kv_heads`` below
    ``n_heads`` is grouped-query attention. Raises InputError naming the bad field.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and value > 0):
                raise InputError(f"{field.name} must be a positive integer, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive finite number, got {value!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise InputError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}")

    @property
    def n_rep(self) -> int:
        """Query heads served by each key/value head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Build from ``config.json`` keys; anything unsupported is refused by name.

        Raises InputError, prefixed with ``source``, for a missing key, a value that would
        change the result, or a key this implementation does not know.
        """
        refuse_unsupported(hf, source)
        heads = hf.get("num_attention_heads")
        defaults = {"num_key_value_heads": heads, "tie_word_embeddings": False}
        dim = hf.get("hidden_size")
        if isinstance(heads, int) and heads > 0 and isinstance(dim, int):
            if hf.get("head_dim") is None and dim % heads:
                raise InputError(
                    f"{source}: hidden_size {dim} is no multiple of num_attention_heads {heads}; "
                    "give head_dim"
                )
            defaults["head_dim"] = dim // heads
        values: dict[str, Any] = {}
        for field, key in HF_KEYS.items():
            value = hf.get(key)
            values[field] = defaults.get(key) if value is None else value
        missing = [HF_KEYS[field] for field, value in values.items() if value is None]
        if missing:
            raise InputError(f"{source}: missing {', '.join(missing)}; add the model's value")
        theta = _rope_theta(hf, source)
        try:
            return cls(**values, rope_theta=theta)
        except InputError as error:
            message = str(error)
            for field, key in HF_KEYS.items():  # the file's own words
                message = re.sub(rf"\b{field}\b", key, message)
            raise InputError(f"{source}: {message}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` form; ``from_hf`` of it is this config again."""
        hf = {key: getattr(self, field) for field, key in HF_KEYS.items()}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **hf,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": self.rope_theta,
        }

    def to_json(self) -> str:
        """Return ``to_hf`` as JSON text, as stored in a checkpoint's metadata."""
        return json.dumps(self.to_hf())


def refuse_unsupported(hf: Mapping[str, Any], source: str) -> None:
    """Raise InputError naming every key whose value this architecture cannot honour."""
    known = {*HF_KEYS.values(), *INERT_KEYS, "rope_theta", "rope_scaling", "rope_parameters"}
    problems = []
    for key, value in hf.items():
        if key in REQUIRED_VALUES:
            if value is not None and value not in REQUIRED_VALUES[key]:
                problems.append(f"{key}={value!r} (supported: {REQUIRED_VALUES[key][0]!r})")
        elif key not in known and not key.startswith("_") and value not in (None, False):
            problems.append(f"{key}={value!r} (unknown: remove it if it changes nothing)")
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and set(rope) <= {"rope_type", "type", "rope_theta"}
        kinds = [rope.get("rope_type"), rope.get("type")] if plain else []
        if not plain or any(kind not in (None, "default") for kind in kinds):
            problems.append(f"{key}={rope!r} (supported: unscaled rotary embeddings)")
    if problems:
        raise InputError(f"{source}: not supported: {'; '.join(problems)}")


def _rope_theta(hf: Mapping[str, Any], source: str) -> Any:
    """Read theta from its old top-level place and its newer nested ones, which must agree."""
    places = {"rope_theta": hf.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        places[f"{key}.rope_theta"] = (hf.get(key) or {}).get("rope_theta")
    found = {place: value for place, value in places.items() if value is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        listing = ", ".join(f"{place}={value}" for place, value in found.items())
        raise InputError(f"{source}: contradictory rotary bases: {listing}; keep one")
    # 10000 is the paper's base and the meaning of an absent key in every Llama config.
    return next(iter(found.values()), 10000.0)
