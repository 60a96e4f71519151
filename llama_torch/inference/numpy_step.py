"""The decoding step of one sequence on the CPU, in NumPy: a product per matrix at memory speed.

One row of activations against a matrix is bound by the memory that holds the matrix. There one
``np.vecdot`` (a BLAS dot product a row) reads about twice as fast as torch's ``F.linear``, and
NumPy's calls begin sooner than torch's, of which a step needs hundreds.
Suffixes and shapes: D dim, H query heads, N key/value heads, R query heads a key/value head,
K head_dim, F hidden_dim, S key position, V vocabulary.
"""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..model.embedding import Embedding
from ..model.kv_cache import StaticCache
from ..model.llama import Block, Llama
from ..model.rope import rope_tables

Array = NDArray[Any]

# Bytes of a matrix from which a second thread brings more than waking it costs (some 30 us).
MIN_SPLIT_BYTES = 16 << 20


class _Layer(NamedTuple):
    """A block's weights and its layer of the cache, all of them views."""

    attn_norm: Array  # [D]
    q: Array  # [H, K, D]
    k: Array  # [N, K, D]
    v: Array  # [N, K, D]
    o: Array  # [D, H K]
    ffn_norm: Array  # [D]
    gate: Array  # [F, D]
    up: Array  # [F, D]
    down: Array  # [D, F]
    keys: Array  # [N, S, K]
    values: Array  # [N, S, K]


class NumpyStep:
    """The step of one sequence: a DecodeStep, see decoding.py.

    It reads the model's weights and writes the cache where they are, without a copy: neither
    may be replaced while this is in use.
    """

    is_captured = False

    def __init__(self, model: Llama, cache: StaticCache) -> None:
        config, head_dim = model.config, model.config.head_dim
        n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
        self.cache, self.eps = cache, config.norm_eps
        self.embed, self.head = _view(model.model.embed_tokens.weight), _view(model.head_weight)
        self.norm = _view(model.model.norm.weight)
        self.layers = [
            _layer(cast(Block, block), head_dim, keys, values)
            for block, keys, values in zip(
                model.model.layers, _view(cache.keys), _view(cache.values), strict=True
            )
        ]
        cos, sin = rope_tables(torch.arange(cache.size)[None], config, cache.keys.dtype)
        # For the two halves of a head, which are rotated as one: [S, 2, K / 2].
        self.cos = torch.stack([cos[0, :, 0], cos[0, :, 0]], dim=1).numpy()
        self.sin = torch.stack([-sin[0, :, 0], sin[0, :, 0]], dim=1).numpy()

        def buffer(*shape: int) -> Array:
            return np.empty(shape, self.embed.dtype)

        self.h, self.out = buffer(config.dim), buffer(config.dim)
        self.gate, self.up = buffer(config.hidden_dim), buffer(config.hidden_dim)
        self.qk, self.rotated = (buffer(n_heads + n_kv_heads, head_dim) for _ in range(2))
        self.attn_out = buffer(n_kv_heads, n_heads // n_kv_heads, head_dim)
        self.n_threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(max(1, self.n_threads - 1))

    @staticmethod
    def supports(model: Llama) -> bool:
        """Return whether the weights are plain CPU matrices in float32 or float64."""
        weights = list(model.parameters())
        plain = (nn.Linear, Embedding, nn.RMSNorm)
        return (
            all(type(m) in plain for m in model.modules() if not list(m.children()))
            and len({weight.dtype for weight in weights}) == 1
            and weights[0].dtype in (torch.float32, torch.float64)
            and all(w.device.type == "cpu" and w.is_contiguous() for w in weights)
        )

    def begin(self, padding: Sequence[int]) -> None:
        """Continue from the cache's length; one sequence has no padding."""
        assert not any(padding)

    def close(self) -> None:
        """Keep nothing."""

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [1, V] after one token; its keys and values go to the cache."""
        x = self.embed[int(tokens_B)].copy()
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite, and the result is right
            for layer in self.layers:
                self._attend(layer, x)
                self._feed_forward(layer, x)
        self.cache.length += 1
        logits = np.empty((1, len(self.head)), x.dtype)
        self._matvec(self.head, self._rms_norm(x, self.norm), logits[0])
        return torch.from_numpy(logits)

    def _attend(self, layer: _Layer, x: Array) -> None:
        """Add attention's output to the residual stream ``x`` [D]."""
        slot = self.cache.length
        h, n_heads = self._rms_norm(x, layer.attn_norm), len(layer.q)
        self._matvec(layer.q, h, self.qk[:n_heads])
        self._matvec(layer.k, h, self.qk[n_heads:])
        self._matvec(layer.v, h, layer.values[:, slot])
        halves = self.qk.reshape(len(self.qk), 2, -1)
        rotated = self.rotated.reshape(halves.shape)
        np.multiply(halves[:, ::-1], self.sin[slot], out=rotated)
        halves *= self.cos[slot]
        rotated += halves
        layer.keys[:, slot] = self.rotated[n_heads:]
        keys, values = layer.keys[:, : slot + 1], layer.values[:, : slot + 1]
        q_NRK = self.rotated[:n_heads].reshape(self.attn_out.shape)
        scores_NRS = q_NRK @ keys.swapaxes(1, 2)
        scores_NRS -= scores_NRS.max(axis=-1, keepdims=True)
        scores_NRS *= 1 / math.sqrt(keys.shape[-1])
        np.exp(scores_NRS, out=scores_NRS)
        np.matmul(scores_NRS, values, out=self.attn_out)
        self.attn_out /= scores_NRS.sum(axis=-1, keepdims=True)
        self._matvec(layer.o, self.attn_out.reshape(-1), self.out)
        x += self.out

    def _feed_forward(self, layer: _Layer, x: Array) -> None:
        """Add SwiGLU's output ``(g / (1 + exp(-g)) * u) Wd`` to the residual stream ``x`` [D]."""
        h, gate, up = self._rms_norm(x, layer.ffn_norm), self.gate, self.up
        self._matvec(layer.gate, h, gate)
        self._matvec(layer.up, h, up)
        up *= gate
        np.negative(gate, out=gate)
        np.exp(gate, out=gate)
        gate += 1
        up /= gate
        self._matvec(layer.down, up, self.out)
        x += self.out

    def _rms_norm(self, x: Array, weight: Array) -> Array:
        """Return RMSNorm of ``x`` [D]: in a buffer, until the next call."""
        np.multiply(x, weight, out=self.h)
        self.h *= 1 / math.sqrt(float(x.dot(x)) / len(x) + self.eps)
        return self.h

    def _matvec(self, weight: Array, x: Array, out: Array) -> None:
        """Multiply ``weight`` [..., n] by ``x`` [n] into ``out`` [...]."""
        if weight.nbytes < MIN_SPLIT_BYTES or self.n_threads == 1:
            np.vecdot(weight, x, out=out)
            return
        bounds = np.linspace(0, len(weight), self.n_threads + 1).astype(int).tolist()
        slices = [slice(*rows) for rows in itertools.pairwise(bounds)]
        futures = [
            self.pool.submit(np.vecdot, weight[rows], x, out=out[rows]) for rows in slices[1:]
        ]
        np.vecdot(weight[slices[0]], x, out=out[slices[0]])
        for future in futures:
            future.result()


def _view(tensor: Tensor) -> Array:
    return tensor.detach().numpy()


def _layer(block: Block, head_dim: int, keys: Array, values: Array) -> _Layer:
    attention, mlp = block.self_attn, block.mlp

    def heads(projection: nn.Linear) -> Array:
        return _view(projection.weight).reshape(-1, head_dim, projection.in_features)

    return _Layer(
        attn_norm=_view(block.input_layernorm.weight),
        q=heads(attention.q_proj),
        k=heads(attention.k_proj),
        v=heads(attention.v_proj),
        o=_view(attention.o_proj.weight),
        ffn_norm=_view(block.post_attention_layernorm.weight),
        gate=_view(mlp.gate_proj.weight),
        up=_view(mlp.up_proj.weight),
        down=_view(mlp.down_proj.weight),
        keys=keys[0],
        values=values[0],
    )
