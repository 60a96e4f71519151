"""The architecture's hyperparameters, and their form in Hugging Face's ``config.json``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_common.errors import InputError, check, check_positive, check_sizes, check_types, flag_of

# ModelConfig field -> Hugging Face key. The rotary fields have two places; see _rope_fields.
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

# ModelConfig field -> key in rope_scaling; and the fields that each rope_type has.
ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}

ROPE_USES = {"default": (), "linear": ("rope_factor",), "llama3": tuple(ROPE_KEYS)}

# Keys whose other values would change the result -> the value that is supported.
NEUTRAL = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "rope_interleaved": False,
}

# Keys about a model's use, storage or description, which do not change the result.
INERT = (
    "architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward do_sample "
    "dtype eos_token_id finetuning_task id2label initializer_range is_llama_config label2id "
    "max_length max_sequence_length name_or_path num_return_sequences output_attentions "
    "output_hidden_states pad_token_id problem_type return_dict temperature tokenizer_class "
    "top_k top_p torch_dtype transformers.js_config transformers_version unk_token_id "
    "unsloth_fixed unsloth_version use_cache use_return_dict"
)

# What config.json says of a reward model, which has a scalar head in place of the language model's:
# Hugging Face's class, and as many names of labels as it has outputs.
REWARD_MODEL = "LlamaForSequenceClassification"
REWARD_KEYS: Mapping[str, Any] = {
    "architectures": [REWARD_MODEL],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}


def is_reward_model(hf: Mapping[str, Any]) -> bool:
    """Return whether ``config.json``'s keys are of a reward model."""
    return hf.get("architectures") == [REWARD_MODEL]


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the architecture (Touvron et al. 2023, section 2.2).

    The defaults train in minutes on two CPU cores. Raises InputError for values out of range or
    that contradict each other.
    """

    dim: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of transformer blocks."""
    n_heads: int = 8
    """Number of query heads."""
    n_kv_heads: int = 0
    """Number of key/value heads; fewer than --n-heads is grouped-query attention. 0 = 4, or
    --n-heads where 4 does not divide it."""
    head_dim: int = 0
    """Width of one head; 0 = dim / n_heads."""
    hidden_dim: int = 0
    """Width of the feed-forward network; 0 = the paper's int(8 dim / 3) rounded up to 32."""
    vocab_size: int = 50257
    """Number of token ids; the GPT-2 encoding has 50257."""
    max_seq_len: int = 256
    """Context length in tokens: of a training window, and of prompt and answer."""
    norm_eps: float = 1e-5
    """RMSNorm's epsilon, added inside the square root."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """Scaling of the rotary frequencies, with the following factors."""
    rope_factor: float = 1.0
    """Divisor of low frequencies (linear: of all)."""
    rope_low_freq_factor: float = 1.0
    """llama3: frequencies of fewer turns in the original context are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """llama3: frequencies of more turns in the original context are not scaled."""
    rope_original_max_seq_len: int = 8192
    """llama3: the original context length, before scaling."""

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(self)
        check_positive(self, "dim", "n_layers", "n_heads", "vocab_size")
        check_positive(self, "max_seq_len", "norm_eps", "rope_theta", *ROPE_KEYS)
        one_of = f"must be one of {', '.join(ROPE_USES)}"
        check(self.rope_type in ROPE_USES, "rope_type", self.rope_type, one_of)
        check(
            self.rope_low_freq_factor < self.rope_high_freq_factor,
            "rope_low_freq_factor",
            self.rope_low_freq_factor,
            f"must be below --rope-high-freq-factor {self.rope_high_freq_factor}",
        )
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads if self.n_heads % 4 else 4)
        if self.head_dim == 0:
            twice = 2 * self.n_heads  # rotary embeddings turn pairs
            near = max(1, self.dim // twice) * twice
            even = f"must be a multiple of --n-heads {self.n_heads}, an even one such as {near}"
            check(self.dim % twice == 0, "dim", self.dim, even)
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.hidden_dim == 0:
            object.__setattr__(self, "hidden_dim", math.ceil(int(8 * self.dim / 3) / 32) * 32)
        check_positive(self, "n_kv_heads", "head_dim", "hidden_dim")
        check(
            self.n_heads % self.n_kv_heads == 0,
            "n_heads",
            self.n_heads,
            f"must be a multiple of --n-kv-heads {self.n_kv_heads}",
        )
        check(
            self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary embeddings"
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Return the config of ``config.json``'s keys.

        Raises InputError that names ``source`` and every key that is unknown, missing, or has a
        value that would change the result.
        """
        known = {*HF_KEYS.values(), *INERT.split(), "rope_theta", "rope_scaling", "rope_parameters"}
        problems = [
            f"{key}={value!r} (supported: {NEUTRAL[key]!r})"
            for key, value in hf.items()
            if key in NEUTRAL and value is not None and value != NEUTRAL[key]
        ]
        problems += [
            f"{key}={value!r} (unknown: remove it if it changes nothing)"
            for key, value in hf.items()
            if key not in NEUTRAL
            and key not in known
            and not key.startswith("_")
            and value not in (None, False, {}, [])
        ]
        rope, rope_problems = _rope_fields(hf)
        if problems := problems + rope_problems:
            raise InputError(f"{source}: not supported: {'; '.join(problems)}")
        values: dict[str, Any] = {name: hf.get(key) for name, key in HF_KEYS.items()}
        for name, key in HF_KEYS.items():
            got = values[name]
            if type(getattr(cls, name)) is not int or got is None:
                continue
            # Zero means "derive it" on the command line alone.
            if type(got) is not int or not 0 < got < 2**31:
                must = f"{key} must be a positive integer below 2^31"
                raise InputError(f"{source}: {must}, got {got!r}")
        derived = {"n_kv_heads": values["n_heads"], "head_dim": 0, "tie_embeddings": False}
        for name, value in derived.items():
            values[name] = value if values[name] is None else values[name]
        missing = [HF_KEYS[name] for name, value in values.items() if value is None]
        if missing:
            raise InputError(f"{source}: missing {', '.join(missing)}; add the model's value")
        try:
            return cls(**values, **rope)
        except InputError as error:
            message = str(error)
            for name, key in (HF_KEYS | ROPE_KEYS | {"rope_theta": "rope_theta"}).items():
                # The file has keys, not flags.
                message = message.replace(f"{flag_of(name)} ", f"{key} ")
            raise InputError(f"{source}: {message}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of ``config.json``, from which ``from_hf`` builds an equal config.

        The rotary base and scaling are written in both of their places: older readers know
        only the first (rope_theta and rope_scaling).
        """
        scaling = {ROPE_KEYS[name]: getattr(self, name) for name in ROPE_USES[self.rope_type]}
        scaling = {"rope_type": self.rope_type, **scaling}
        return {
            "architectures": ["LlamaForCausalLM"],
            **NEUTRAL,
            **{key: getattr(self, name) for name, key in HF_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling if len(scaling) > 1 else None,
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
            "dtype": "float32",
        }


def _rope_fields(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the rotary fields of both of their places, and a list of problems found.

    Without a base in either place it is 10000, the paper's.
    """
    problems, thetas, scalings = [], [hf.get("rope_theta")], []
    for place in ("rope_scaling", "rope_parameters"):
        if hf.get(place) is None:
            continue
        rope = dict(hf[place]) if isinstance(hf[place], dict) else {"not an object": hf[place]}
        thetas.append(rope.pop("rope_theta", None))
        kinds = [
            kind for kind in map(rope.pop, ("rope_type", "type"), (None, None)) if kind is not None
        ]
        kind = kinds[0] if kinds else "default"
        known = isinstance(kind, str) and kind in ROPE_USES
        keys = {ROPE_KEYS[name]: name for name in ROPE_USES[kind]} if known else {}
        if not known or kinds[1:] not in ([], [kind]) or set(rope) - set(keys):
            problems.append(f"{place}={hf[place]!r} (supported: default, linear, llama3 scaling)")
        elif missing := [key for key in keys if rope.get(key) is None]:
            problems.append(f"{place}={hf[place]!r} (missing {', '.join(missing)})")
        else:
            scalings.append({"rope_type": kind, **{keys[key]: rope[key] for key in keys}})
    found = [theta for theta in thetas if theta is not None]
    if any(theta != found[0] for theta in found):
        problems.append(f"contradictory rotary bases rope_theta={found}; keep one")
    if any(scaling != scalings[0] for scaling in scalings):
        problems.append("rope_scaling contradicts rope_parameters; keep one of them")
    fields = {"rope_theta": found[0] if found else 10000.0}
    return fields | (scalings[0] if scalings else {}), problems
