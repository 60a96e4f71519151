"""The LLaMA 2 architecture as torch modules, whose parameters have Hugging Face's names.

Suffixes: B batch, T query position (this call's tokens), S key position (cache and this call),
D dim, F hidden_dim, H query heads, N key/value heads, K head_dim, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, for_every_head
from .config import ModelConfig
from .embedding import Embedding
from .kv_cache import Cache, LayerCache, StaticCache, StaticLayerCache
from .masks import Mask, default_mask
from .quantized_linear import QuantizedLinear
from .rope import RopeTables, apply_rope, rope_tables

Trace = Callable[[str, Tensor], None]


def no_trace(name: str, value: Tensor) -> None:
    """Discard an activation: the trace of a call that records none."""


def linear_products(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Return each layer's product with x: [..., in] to [..., out]."""
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023); multi-head if n_kv_heads == n_heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.products = linear_products  # or float8_linear's
        self.head_dim = config.head_dim
        # A Python bool, so that torch.compile with dynamic shapes does not make it symbolic.
        self.is_grouped = config.n_heads != config.n_kv_heads
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, queries, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.dim, bias=False)

    def forward(
        self,
        h_BTD: Tensor,
        tables: RopeTables,
        mask: Mask | None,
        is_causal: bool,
        past: LayerCache | StaticLayerCache | None,
        trace: Trace = no_trace,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return ``softmax(q k^T / sqrt(K)) v Wo^T`` [B, T, D], and keys and values [B, N, S, K].

        h_BTD      the normed residual stream.
        tables     cos and sin of the rotation angles, see rope.py.
        mask       bool [B, 1, T, S], or Documents. None: causal if ``is_causal``, which is for
                   calls without a cache; else every query attends to every key. See masks.py.
        past       the layer's cache; the keys and values returned include its own.
        trace      called with the name and value of each activation.
        """
        shape = (*h_BTD.shape[:2], -1, self.head_dim)
        projected = self.products(h_BTD, (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK, k_BTNK, v_BTNK = (x.view(shape) for x in projected)
        trace("q", q_BTHK)
        trace("k", k_BTNK)
        trace("v", v_BTNK)
        q_BTHK, k_BTNK = apply_rope(q_BTHK, tables), apply_rope(k_BTNK, tables)
        trace("q_rope", q_BTHK)
        trace("k_rope", k_BTNK)
        q, k, v = q_BTHK.transpose(1, 2), k_BTNK.transpose(1, 2), v_BTNK.transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        attn_BTHK = attend(q, k, v, mask, is_causal, self.is_grouped).transpose(1, 2)
        trace("attn", attn_BTHK)
        (out_BTD,) = self.products(attn_BTHK.flatten(2), (self.o_proj,))
        trace("attn_proj", out_BTD)
        return out_BTD, (k, v)


class FeedForward(nn.Module):
    """SwiGLU: ``(silu(h Wg^T) * (h Wu^T)) Wd^T``, weights [out, in] (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.products = linear_products
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, h_BTD: Tensor, trace: Trace = no_trace) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        gate_BTF, up_BTF = self.products(h_BTD, (self.gate_proj, self.up_proj))
        trace("gate", gate_BTF)
        trace("up", up_BTF)
        hidden_BTF = F.silu(gate_BTF) * up_BTF
        trace("ffn", hidden_BTF)
        (out_BTD,) = self.products(hidden_BTF, (self.down_proj,))
        trace("ffn_proj", out_BTD)
        return out_BTD


class Block(nn.Module):
    """One pre-norm residual block: ``x += attention(norm(x))``, then ``x += ffn(norm(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        tables: RopeTables,
        mask: Mask | None,
        is_causal: bool,
        past: LayerCache | StaticLayerCache | None,
        trace: Trace = no_trace,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the residual stream [B, T, D] after this block, and the keys and values.

        Arguments and keys and values are those of Attention.forward, but for ``x_BTD``, the
        residual stream before the block.
        """
        h_BTD = self.input_layernorm(x_BTD)
        trace("attn_norm", h_BTD)
        h_BTD, present = self.self_attn(h_BTD, tables, mask, is_causal, past, trace)
        x_BTD = x_BTD + h_BTD
        trace("attn_residual", x_BTD)
        h_BTD = self.post_attention_layernorm(x_BTD)
        trace("ffn_norm", h_BTD)
        x_BTD = x_BTD + self.mlp(h_BTD, trace)
        trace("residual", x_BTD)
        return x_BTD, present


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the model without its vocabulary projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Arguments of torch.utils.checkpoint, if blocks are to be recomputed in backward passes.
        self.recompute: dict[str, Any] | None = None
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | StaticCache | None = None,
        trace: Trace = no_trace,
    ) -> tuple[Tensor, Cache | StaticCache]:
        """Return the normed residual stream [B, T, D] and the extended cache; see Llama.forward."""
        start = 0 if cache is None else cache.length
        length, device = tokens_BT.shape[1], tokens_BT.device
        if positions is None:
            positions = torch.arange(start, start + length, device=device)[None]
        is_causal = False
        if mask is None:
            mask, is_causal = default_mask(length, start, device)
        x_BTD = self.embed_tokens(tokens_BT)
        mask = for_every_head(mask, x_BTD, self.config.head_dim)
        trace("embed", x_BTD)
        tables = rope_tables(positions, self.config, x_BTD.dtype)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else cache.layer(i)
            layer_trace = _prefixed(trace, f"layers.{i}.")
            block_args = x_BTD, tables, mask, is_causal, past, layer_trace
            if self.recompute is None or not torch.is_grad_enabled():
                x_BTD, (k, v) = layer(*block_args)
            else:
                x_BTD, (k, v) = checkpoint(
                    layer, *block_args, use_reentrant=False, **self.recompute
                )
            keys.append(k)
            values.append(v)
        x_BTD = self.norm(x_BTD)
        trace("norm", x_BTD)
        if isinstance(cache, StaticCache):
            cache.length += length
            return x_BTD, cache
        return x_BTD, Cache(tuple(keys), tuple(values))


class Llama(nn.Module):
    """The LLaMA 2 language model; ``state_dict()`` has a checkpoint's names and shapes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def has_own_head(self) -> bool:
        """Whether the head is a parameter of its own, and not the embedding."""
        return not self.config.tie_embeddings

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection [V, D]; the embedding's weight where the two are tied."""
        embedding = self.model.embed_tokens.weight
        if self.config.tie_embeddings:
            return embedding
        if isinstance(self.lm_head, QuantizedLinear):
            return self.lm_head.dequantize(embedding.dtype)
        return self.lm_head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | StaticCache | None = None,
        trace: Trace = no_trace,
        project: bool = True,
    ) -> tuple[Tensor, Cache | StaticCache]:
        """Return the logits [B, T, V] and the cache extended by this call.

        tokens_BT  token ids, int64 [B, T].
        positions  rotary positions, int64 [B, T]; default: they follow the cache.
        mask       bool [B, T, S], True = may attend; without a cache Documents, which stand for
                   one; default: causal. See masks.py.
        cache      the cache that an earlier call returned. A Cache is not changed; a StaticCache
                   is written in place.
        trace      called with the name and value of each activation.
        project    False: return the normed residual stream [B, T, D] in place of the logits, for
                   a loss that computes them chunk by chunk.
        """
        x_BTD, cache = self.model(
            tokens_BT, positions=positions, mask=mask, cache=cache, trace=trace
        )
        if not project:
            return x_BTD, cache
        logits_BTV = self.head(x_BTD)
        trace("logits", logits_BTV)
        return logits_BTV, cache

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [..., V] of the normed residual stream [..., D]."""
        tied = self.config.tie_embeddings
        logits: Tensor = F.linear(x_BTD, self.head_weight) if tied else self.lm_head(x_BTD)
        return logits

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw every matrix from N(0, 0.02^2), and set the norms to one, in place.

        The standard deviation of the two projections that add to the residual stream is divided
        by sqrt(2 n_layers), so that the stream's variance does not grow with depth (Radford et
        al. 2019, section 2.3; the Llama 2 paper states no initialisation).
        """
        for part in self.parts():
            self.init_part(part, generator)

    def parts(self) -> list[nn.Module]:
        """Return modules that together have every parameter, in the order of ``parameters()``."""
        decoder = self.model
        head = [self.lm_head] if self.has_own_head else []
        return [decoder.embed_tokens, *decoder.layers, decoder.norm, *head]

    def new_parts(self) -> list[nn.Module]:
        """Return the parts that are drawn where a run begins from a checkpoint: none."""
        return []

    @torch.no_grad()
    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights of one of ``parts()``; ``init_weights`` draws all, in that order."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, weight in part.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                is_residual_projection = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(
                    0.0, residual if is_residual_projection else 0.02, generator=generator
                )


def _prefixed(trace: Trace, prefix: str) -> Trace:
    """Return a trace that puts ``prefix`` before every name."""
    return trace if trace is no_trace else lambda name, value: trace(prefix + name, value)
