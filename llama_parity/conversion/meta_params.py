"""Meta's params.json: what it says of a model, and what it cannot say."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_torch.model.config import ModelConfig

# The keys of params.json that say what is computed; the harmless are settings of Meta's programs.
PARAMS: dict[str, type] = {
    **dict.fromkeys(("dim", "n_layers", "n_heads", "multiple_of", "n_kv_heads", "vocab_size"), int),
    **dict.fromkeys(("norm_eps", "ffn_dim_multiplier", "rope_theta", "rope_scaling_factor"), float),
    "use_scaled_rope": bool,
}
REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
HARMLESS = ("max_seq_len", "max_batch_size", "model_parallel_size")
# What use_scaled_rope means in Meta's code; the factor differs between releases.
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
}
LLAMA3_THETA = 500000.0


def read_params(path: Path) -> dict[str, Any]:
    """Read params.json; InputError names every key that is missing, unknown or unusable."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; copy it from where the weights came from")
    params = {key: value for key, value in read_json(path).items() if value is not None}
    problems = [f"{key} is missing" for key in REQUIRED if key not in params]
    for key, value in params.items():
        if key not in PARAMS and key not in HARMLESS and value is not False:
            problems.append(f"{key}={value!r} (unknown: remove it if it changes nothing)")
        elif key in PARAMS and not _is_usable(key, value):
            kind = "true or false" if PARAMS[key] is bool else f"a positive {PARAMS[key].__name__}"
            problems.append(f"{key}={value!r} (must be {kind})")
    if "rope_scaling_factor" in params and not params.get("use_scaled_rope"):
        problems.append("rope_scaling_factor without use_scaled_rope: keep both or neither")
    if problems:
        raise InputError(f"{path}: not supported: {'; '.join(problems)}")
    return params


def _is_usable(key: str, value: object) -> bool:
    if PARAMS[key] is bool:
        return isinstance(value, bool)
    if type(value) is int:
        return 0 < value < 2**31 or (key, value) == ("vocab_size", -1)
    return PARAMS[key] is float and isinstance(value, float) and 0 < value < 1e30


def hidden_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Return the feed-forward width that Meta's code derives from these keys of params.json."""
    width = int(2 * 4 * dim / 3)
    width = width if multiplier is None else int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def config_from(
    params: Mapping[str, Any], path: Path, max_seq_len: int, factor: float
) -> ModelConfig:
    """Build the config, untied, that params.json and the two flags describe."""
    theta, scaled = float(params.get("rope_theta", 10000)), params.get("use_scaled_rope", False)
    stated = params.get("rope_scaling_factor", factor if scaled else 0)
    if factor not in (0, stated):
        said = f"rope_scaling_factor={stated}" if scaled else "no use_scaled_rope"
        raise InputError(f"--rope-scaling-factor {factor}: {path} has {said}; leave the flag out")
    if scaled and not stated:
        raise InputError(
            f"{path}: use_scaled_rope without its factor; give --rope-scaling-factor, "
            "8 for Llama 3.1 and 32 for Llama 3.2"
        )
    rope: dict[str, Any] = SCALED_ROPE | {"rope_factor": float(stated)} if scaled else {}
    hidden = hidden_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
    try:
        return ModelConfig(
            **{name: params[name] for name in ("dim", "n_layers", "n_heads", "vocab_size")},
            n_kv_heads=params.get("n_kv_heads", params["n_heads"]),
            hidden_dim=hidden or -1,  # where 0 would mean another rule
            max_seq_len=max_seq_len or (131072 if scaled else 8192 if is_llama3(theta) else 4096),
            norm_eps=float(params["norm_eps"]),
            rope_theta=theta,
            tie_embeddings=False,
            **rope,
        )
    except InputError as error:
        # The keys are the flags' names with underscores.
        keys = re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise InputError(f"{path}: {keys}") from None


def is_llama3(rope_theta: float) -> bool:
    """Return whether a rotary base is Llama 3's: its parents' is 10^4 and Code Llama's 10^6."""
    return rope_theta == LLAMA3_THETA


def check_expressible(config: ModelConfig, shards: int, source: Path) -> None:
    """Raise InputError naming all that Meta's code cannot express or cut into ``shards``."""
    problems = []
    if config.head_dim * config.n_heads != config.dim:
        problems.append(f"head_dim {config.head_dim} is not dim {config.dim} / {config.n_heads}")
    if config.rope_type == "linear":
        problems.append("linear scaling of the rotary frequencies")
    if config.rope_type == "llama3":
        for name, value in SCALED_ROPE.items():
            if (has := getattr(config, name)) != value:
                problems.append(f"{name} {has}, where it has {value}")
    for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "dim"):
        if getattr(config, name) % shards:
            problems.append(f"--shards {shards} does not divide {name} {getattr(config, name)}")
    if problems:
        raise InputError(f"{source}: Meta's form cannot express {'; '.join(problems)}")


def params_of(config: ModelConfig) -> dict[str, Any]:
    """Return params.json; keys that Llama 2's loader does not know are there only if needed.

    No max_seq_len: Meta's loaders pass it themselves, and would pass it twice.
    """
    params: dict[str, Any] = {key: getattr(config, key) for key in ("dim", "n_layers", "n_heads")}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    hidden, multiple_of = config.hidden_dim, 256
    if hidden_width(config.dim, multiple_of) != hidden:
        multiple_of = math.gcd(hidden, 256)
        # The half keeps rounding from taking the product below the width.
        params["ffn_dim_multiplier"] = (hidden + 0.5) / int(2 * 4 * config.dim / 3)
    params |= {"multiple_of": multiple_of, "vocab_size": config.vocab_size}
    params["norm_eps"] = config.norm_eps
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    if config.rope_type == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_factor}
    assert hidden_width(config.dim, multiple_of, params.get("ffn_dim_multiplier")) == hidden
    return params
