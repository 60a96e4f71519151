"""The architecture of one model, and its Hugging Face ``config.json`` form."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 4000  # characters of an error message


class InputError(ValueError):
    """Something a user supplied is wrong; the message names it and the remedy.

    It is one line that is safe to print: a control character or a mark that turns the direction of
    writing, from a file that it quotes, is escaped. Of a very long one the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(_cut_middle(str(message)).splitlines())
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        super().__init__(_cut_middle("".join(shown)))


def _cut_middle(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 4 :]}"


# LlamaConfig field -> Hugging Face key. The rotary fields have two places; see _rope_places.
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

# LlamaConfig field -> key below rope_scaling; and the fields of each kind of scaling.
ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}
ROPE_USES = {"default": (), "linear": ("rope_factor",), "llama3": tuple(ROPE_KEYS)}

# Keys that change the result, with their only supported values.
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "rope_interleaved": (False,),
}

# Keys of a model's use, storage and reporting, which do not change the result.
INERT_KEYS = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_sequence_length",
    "name_or_path",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
}


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a model (Llama 2 paper, section 2.2 and table 1).

    ``head_dim`` is explicit: it need not equal ``dim / n_heads``. ``n_kv_heads`` below
    ``n_heads`` is grouped-query attention. ``rope_type`` other than "default" scales the rotary
    frequencies by the fields after it (see ops.rope_frequencies). Integers are below 2^31, as every
    library that reads such a file can hold them. Raises InputError naming the bad field.
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
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and 0 < value < 2**31):
                raise InputError(
                    f"{field.name} must be a positive integer below 2^31, got {value!r}"
                )
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type is float and not (number and 0 < value < 1e300):
                raise InputError(f"{field.name} must be a positive finite number, got {value!r}")
        if self.rope_type not in ROPE_USES:
            raise InputError(f"rope_type must be one of {', '.join(ROPE_USES)}")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise InputError("rope_low_freq_factor must be below rope_high_freq_factor")
        if not isinstance(self.tie_embeddings, bool):
            raise InputError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}")

    @property
    def n_rep(self) -> int:
        """The number of query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Return the config of the keys of a ``config.json``.

        Raises InputError, prefixed with ``source``, for a missing key, an unsupported value that
        changes the result, or an unknown key.
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
        values |= _rope_fields(hf, source)
        try:
            return cls(**values)
        except InputError as error:
            message = str(error)
            for field, key in (HF_KEYS | ROPE_KEYS).items():  # name the file's keys, not ours
                message = re.sub(rf"\b{field}\b", key, message)
            raise InputError(f"{source}: {message}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of a ``config.json``, from which ``from_hf`` makes this config again."""
        hf = {key: getattr(self, field) for field, key in HF_KEYS.items()}
        scaling = {ROPE_KEYS[field]: getattr(self, field) for field in ROPE_USES[self.rope_type]}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **hf,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": {"rope_type": self.rope_type, **scaling} if scaling else None,
        }

    def to_json(self) -> str:
        """Return ``to_hf`` as JSON text, as stored in a checkpoint's metadata."""
        return json.dumps(self.to_hf())


def refuse_unsupported(hf: Mapping[str, Any], source: str) -> None:
    """Raise InputError naming every unknown key and every unsupported value."""
    known = {*HF_KEYS.values(), *INERT_KEYS, "rope_theta", "rope_scaling", "rope_parameters"}
    problems = []
    for key, value in hf.items():
        if key in REQUIRED_VALUES:
            if value is not None and value not in REQUIRED_VALUES[key]:
                problems.append(f"{key}={value!r} (supported: {REQUIRED_VALUES[key][0]!r})")
        elif key not in known and not key.startswith("_") and value not in (None, False, {}, []):
            problems.append(f"{key}={value!r} (unknown: remove it if it changes nothing)")
    for key, rope in _rope_places(hf):
        kinds = {rope.get("rope_type"), rope.get("type")} - {None} if _is_rope(rope) else set()
        kind = next(iter(kinds), "default")
        uses = [ROPE_KEYS[field] for field in ROPE_USES.get(kind, ())]
        allowed = {"rope_type", "type", "rope_theta", *uses}
        if not _is_rope(rope) or len(kinds) > 1 or kind not in ROPE_USES or set(rope) - allowed:
            problems.append(f"{key}={rope!r} (supported: default, linear and llama3 scaling)")
        elif lacking := [name for name in uses if rope.get(name) is None]:
            problems.append(f"{key}={rope!r} (missing {', '.join(lacking)})")
    if problems:
        raise InputError(f"{source}: not supported: {'; '.join(problems)}")


def _rope_places(hf: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the rotary settings present, by key: the older key's first, then the newer's."""
    places = ("rope_scaling", "rope_parameters")
    return [(place, hf[place]) for place in places if hf.get(place) is not None]


def _is_rope(rope: object) -> bool:
    kinds = [rope.get("rope_type"), rope.get("type")] if isinstance(rope, dict) else [0]
    return all(kind is None or isinstance(kind, str) for kind in kinds)


def _rope_fields(hf: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return theta and the scaling by field, from their older and newer places, which must agree.

    An absent theta is 10000, the paper's base, as in every Llama config. ``refuse_unsupported``
    has been called before.
    """
    places = _rope_places(hf)
    thetas = {"rope_theta": hf.get("rope_theta")}
    thetas |= {f"{place}.rope_theta": rope.get("rope_theta") for place, rope in places}
    scalings = [
        {
            "rope_type": rope.get("rope_type") or rope.get("type") or "default",
            **{field: rope[key] for field, key in ROPE_KEYS.items() if rope.get(key) is not None},
        }
        for _, rope in places
    ]
    found = [theta for theta in thetas.values() if theta is not None]
    if any(theta != found[0] for theta in found):
        listing = ", ".join(f"{place}={theta}" for place, theta in thetas.items() if theta)
        raise InputError(f"{source}: contradictory rotary bases: {listing}; keep one")
    if any(scaling != scalings[0] for scaling in scalings):
        raise InputError(f"{source}: rope_scaling contradicts rope_parameters; keep one of them")
    return {"rope_theta": found[0] if found else 10000.0, **(scalings[0] if scalings else {})}
