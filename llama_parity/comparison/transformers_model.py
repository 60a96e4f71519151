"""Run transformers' Llama, in float64 throughout if that is its dtype, and read its activations."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from reference_np.backend import Array

from .empty_weights import without_weights
from .float64 import LiftFloat32


def config_from(hf: Mapping[str, Any], n_layers: int) -> Any:
    """Return transformers' config of a config.json's content, with ``n_layers`` layers.

    Special tokens are left out: a small vocabulary may have no room for them. Raises
    NotImplementedError for a config that transformers cannot run.
    """
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise NotImplementedError("dim is not a multiple of n_heads")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    given = {**hf, **tokens, "num_hidden_layers": n_layers}
    return transformers.LlamaConfig(**given | {"attn_implementation": "eager"})


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """Build the model of transformers' config, its parameters on the meta device."""
    with without_weights():
        model: Any = transformers.LlamaForCausalLM(config)
        model = model.to(dtype).eval()
    # The rotary frequencies are no parameter: they are needed, and must not be rounded to dtype.
    with LiftFloat32() if dtype == torch.float64 else nullcontext():
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def call(
    model: Any,
    tokens: Array,
    positions: Array | None,
    mask: Array | None,
    cache: DynamicCache | None = None,
) -> tuple[torch.Tensor, DynamicCache]:
    """Return the logits [B, T, V] of tokens [B, T] and the cache with them added.

    positions: int64 [B, T]; mask: bool [B, T, S], True = may attend. ``cache`` is not changed.
    """
    dtype = model.dtype
    cache = DynamicCache() if cache is None else copy.deepcopy(cache)
    start = cache.get_seq_length()
    batch, length = tokens.shape
    if mask is None:  # without one, transformers takes jumps in positions for borders of texts
        mask = np.tril(np.ones((1, length, start + length), bool), start)
    mask = np.broadcast_to(mask, (batch, *mask.shape[1:]))
    added = torch.zeros(mask.shape, dtype=dtype)
    added[torch.from_numpy(~mask)] = torch.finfo(dtype).min
    extra = {} if positions is None else {"position_ids": torch.from_numpy(np.array(positions))}
    with LiftFloat32() if dtype == torch.float64 else nullcontext():
        out = model(
            torch.from_numpy(np.array(tokens)),
            attention_mask=added[:, None],
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
    return out.logits, cache


@contextmanager
def tracing(model: Any, note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``note`` with the name and value of every activation that the model computes."""
    tracer = _Tracer(note, model.config.head_dim)
    inner, real_rotary = model.model, modeling_llama.apply_rotary_pos_emb

    def rotary(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> Any:
        q, k = real_rotary(q, k, *rest, **more)
        tracer.note("q_rope", q.transpose(1, 2))
        tracer.note("k_rope", k.transpose(1, 2))
        return q, k

    tracer.on(inner.embed_tokens, "embed")
    for index, layer in enumerate(inner.layers):
        tracer.watch(layer, index)
    tracer.on(inner.norm, "norm")
    tracer.on(model.lm_head, "logits")
    modeling_llama.apply_rotary_pos_emb = rotary
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = real_rotary
        for handle in tracer.handles:
            handle.remove()


class _Tracer:
    """Hooks on transformers' modules, which name activations by the layer that is running."""

    def __init__(self, note: Callable[[str, torch.Tensor], None], head_dim: int) -> None:
        self._note, self.head_dim = note, head_dim
        self.prefix = ""
        self.handles: list[Any] = []

    def note(self, name: str, value: torch.Tensor) -> None:
        """Pass on an activation, its name prefixed with the layer's."""
        self._note(self.prefix + name, value)

    def on(self, module: Any, name: str, heads: bool = False, of_input: bool = False) -> None:
        """Note a module's output, or its input; with ``heads``, [B, T, H * K] as [B, T, H, K]."""

        def view(value: torch.Tensor) -> torch.Tensor:
            return value.unflatten(-1, (-1, self.head_dim)) if heads else value

        if of_input:
            hook = module.register_forward_pre_hook(lambda _, x: self.note(name, view(x[0])))
        else:
            hook = module.register_forward_hook(lambda _, x, y: self.note(name, view(y)))
        self.handles.append(hook)

    def watch(self, layer: Any, index: int) -> None:
        """Note the activations of layer ``index``."""

        def enter(*_: Any) -> None:
            self.prefix = f"layers.{index}."

        def leave(*_: Any) -> None:
            self.prefix = ""

        attention, feed_forward = layer.self_attn, layer.mlp
        self.handles.append(layer.register_forward_pre_hook(enter))
        self.on(layer.input_layernorm, "attn_norm")
        for short in "qkv":
            self.on(getattr(attention, f"{short}_proj"), short, heads=True)
        self.on(attention.o_proj, "attn", heads=True, of_input=True)
        self.on(attention.o_proj, "attn_proj")
        self.on(layer.post_attention_layernorm, "attn_residual", of_input=True)
        self.on(layer.post_attention_layernorm, "ffn_norm")
        self.on(feed_forward.gate_proj, "gate")
        self.on(feed_forward.up_proj, "up")
        self.on(feed_forward.down_proj, "ffn", of_input=True)
        self.on(feed_forward.down_proj, "ffn_proj")
        self.on(layer, "residual")
        self.handles.append(layer.register_forward_hook(leave))
