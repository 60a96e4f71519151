"""transformers 5's LlamaForCausalLM with each of its attentions, and from_pretrained.

Tested with transformers 5.24.0 and torch 2.13.0 (``pip install transformers==5.24.0
torch==2.13.0``). ``Eager`` gets every mask as terms of the scores. ``Sdpa`` and ``Flex`` get what
their users give: no mask where it is causal, attention_mask [B, S] of padded rows, positions
alone for packed documents, and a boolean mask [B, 1, T, S] for others.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.limits import Limits, real_tokens

from ..backends import torch_port
from ..backends.transformers_backend import Transformers

REQUIRES = ("transformers==5.24.0", "torch==2.13.0")
OBJECTS = ("Eager", "Sdpa", "Flex", "Directory")
MINUTES = 15.0  # Flex compiles


class Eager(Transformers):
    """``attn_implementation="eager"``: products and a softmax."""

    from_directory: Any = None  # Directory's


class Sdpa(Transformers):
    """``attn_implementation="sdpa"``, the default: scaled_dot_product_attention."""

    attention = "sdpa"
    from_directory: Any = None

    def _model(self, config: Any, params: Any) -> Any:
        model = super()._model(config, params)
        model.set_attn_implementation(self.attention)
        return model

    def _call(
        self, model: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        cache = DynamicCache() if cache is None else copy.deepcopy(cache)
        more = {"past_key_values": cache, "use_cache": True}
        if is_packed(positions, mask):  # told from the positions, and only without a cache
            more, mask = {"use_cache": False}, None
        if positions is not None:
            more["position_ids"] = torch.from_numpy(positions)
        with LiftFloat32() if model.dtype == torch.float64 else nullcontext():
            given = None if mask is None else self._given(mask)
            return model(torch.from_numpy(tokens), attention_mask=given, **more).logits, cache

    def _given(self, mask: Any) -> Any:
        """Return attention_mask: [B, S] of padded rows, or the mask itself as [B, 1, T, S]."""
        real = real_tokens(mask)
        length, total = mask.shape[1:]
        start = total - length
        own = np.eye(length, total, start, dtype=bool)
        if np.array_equal(mask, np.tril(np.ones_like(mask), start) & real[:, None] | own):
            return torch.from_numpy(real).long()
        return torch.from_numpy(mask)[:, None]


def is_packed(positions: Any, mask: Any) -> bool:
    """Return whether the mask is that of documents in one row, each at positions 0, 1, ..."""
    if positions is None or mask is None or len(positions) > 1 or mask.shape[1] != mask.shape[2]:
        return False
    document = np.cumsum(positions[0] == 0)
    steps = np.diff(positions[0])
    return bool(
        np.all((steps == 1) | (positions[0, 1:] == 0))
        and document[0] == 1 < document[-1]
        and np.array_equal(mask[0], np.tril(document[:, None] == document))
    )


class Flex(Sdpa):
    """``attn_implementation="flex_attention"``: a compiled kernel, on a CPU without gradients."""

    attention = "flex_attention"
    dtypes: Any = ("float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim a multiple of n_heads", masks="padding", float32_angles=("float32",)
    )

    def loss_and_grads(self, *_: Any) -> Any:
        raise NotImplementedError("flex_attention has no backward pass on a CPU")


class Directory:
    """``LlamaForCausalLM.from_pretrained``, with the attention of its own choice."""

    dtypes = Transformers.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        kind = getattr(torch, dtype)
        model = LlamaForCausalLM.from_pretrained(path, dtype=kind).eval()
        if kind == torch.float64:
            with LiftFloat32():  # the rotary frequencies, which transformers computes in float32
                model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

        @torch.no_grad()
        def logits(tokens: Any) -> Any:
            with LiftFloat32() if kind == torch.float64 else nullcontext():
                return torch_port.to_numpy(model(torch.from_numpy(tokens)).logits)

        return logits
