"""Keep a comparison inside the limits that a backend declares (reference_np/limits.py)."""

import dataclasses

import numpy as np

from reference_np.config import InputError, LlamaConfig
from reference_np.limits import Limits

from .padding import find_padding
from .source import Source
from .trace_format import Call

RANDOM_CHECKPOINT = "llama_parity.random_checkpoint"


def require_config(limits: Limits, checkpoint: Source, spec: str) -> None:
    """Raise InputError where a checkpoint is of an architecture outside the limits of ``spec``."""
    config = checkpoint.config
    if name := limits.excluding(config):
        found = {
            "head_dim": f"not {config.head_dim} with dim {config.dim} and {config.n_heads} heads",
            "rope_types": f"without {config.rope_type!r}",
            "tied": f"without {config.tie_embeddings}",
        }
        raise InputError(
            f"--against {spec}: it declares the limit {name} = {getattr(limits, name)!r}, "
            f"{found[name]}, and so {checkpoint.path} is "
            "outside; give another checkpoint, such as one that "
            f"python -m {RANDOM_CHECKPOINT} DIR {limits.checkpoint_flags()} writes"
        )


def config_within(limits: Limits, config: LlamaConfig) -> LlamaConfig:
    """Return the config with the context and the epsilon that the limits allow.

    Neither changes what is computed at a position: a shorter context leaves the far ones out, and
    epsilon is rounded to float32 for a backend that stores it so.
    """
    context = min(config.max_seq_len, limits.context or config.max_seq_len)
    eps = float(np.float32(config.norm_eps)) if limits.float32_epsilon else config.norm_eps
    return dataclasses.replace(config, max_seq_len=context, norm_eps=eps)


def exceeded_limit(limits: Limits, call: Call) -> str:
    """Return ``limit = value`` for a limit that a call exceeds; "" for a call inside all."""
    name = ""
    if call.after is not None and limits.cache == "none":
        name = "cache"
    elif limits.batch is not None and len(call.tokens) > limits.batch:
        name = "batch"
    elif call.mask is not None and (side := _padding_side(call)) not in limits.padding_sides:
        # A mask that is no padding at all is inside "any" alone.
        name = "" if side is None and limits.masks == "any" else "masks"
    elif call.positions is not None and limits.positions != "any":
        first = call.positions[:1, :1]
        shifted = (call.positions == first + np.arange(call.tokens.shape[1])).all()
        name = "" if shifted and limits.positions == "shifted" else "positions"
    return f"{name} = {getattr(limits, name)!r}" if name else ""


def _padding_side(call: Call) -> bool | None:
    """Return True for padding on the left, False for the right, None where the mask is another.

    Of a call that continues another, as if the cached tokens were its own.
    """
    assert call.mask is not None
    real = call.mask[:, -1]
    if call.after is None:
        (padding,) = find_padding([call])
        if padding is None:
            return None
        real = ~padding
    return not bool(real[:, 0].all())
