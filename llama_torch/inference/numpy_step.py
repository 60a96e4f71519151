"""The decoding step of one sequence on the CPU, in NumPy.

A matrix-vector product is bound by reading the matrix from memory. ``np.vecdot`` (a BLAS dot
product for each row) reads about twice as fast there as torch's ``F.linear``, and a NumPy call,
of which a step makes hundreds, has less overhead than a torch call.
Suffixes and shapes: D dim, H query heads, N key/value heads, R query heads per key/value head,
K head_dim, F hidden_dim, S key position (cache column), V vocabulary.
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

# Matrices of fewer bytes are read by one thread: waking another takes some 30 us.
MIN_SPLIT_BYTES = 16 << 20


class _Layer(NamedTuple):
    """A block's weights and its layer of the cache, as views of torch's memory."""

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
    """Decoding step of one sequence: a DecodeStep, see decoding.py.

    Reads the model's weights and writes the cache in place, through views: the tensors of either
    must not be replaced while the step is in use.
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
        # Tables [S, 2, K / 2] for both halves of a head: x' = x cos + swapped(x) (-sin, sin).
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
        """Return whether the layers are plain and on a CPU, all in float32 or all in float64."""
        weights = list(model.parameters())
        plain = (nn.Linear, Embedding, nn.RMSNorm)
        return (
            all(type(m) in plain for m in model.modules() if not list(m.children()))
            and len({weight.dtype for weight in weights}) == 1
            and weights[0].dtype in (torch.float32, torch.float64)
            and all(w.device.type == "cpu" and w.is_contiguous() for w in weights)
        )

    def begin(self, padding: Sequence[int]) -> None:
        """Continue after the cache's last column; one sequence has no padding."""
        assert not any(padding)

    def close(self) -> None:
        """Do nothing: no step is kept for later requests."""

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [1, V] after one token, int64 [1]; write its keys and values.

        Raises IndexError for a token outside the vocabulary.
        """
        token = int(tokens_B)
        if token < 0:  # which NumPy would count from the end
            raise IndexError(f"token {token} is negative")
        x = self.embed[token].copy()
        with np.errstate(over="ignore"):  # exp(-g) may be inf: g / inf is 0, as it should be
            for layer in self.layers:
                self._attend(layer, x)
                self._feed_forward(layer, x)
        self.cache.length += 1
        logits = np.empty((1, len(self.head)), x.dtype)
        self._matvec(self.head, self._rms_norm(x, self.norm), logits[0])
        return torch.from_numpy(logits)

    def _attend(self, layer: _Layer, x: Array) -> None:
        """Add the attention output to the residual stream ``x`` [D], in place."""
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
        """Add ``(g / (1 + exp(-g)) * u) Wd^T`` (SwiGLU) to the residual stream ``x`` [D], in place.

        g = h Wg^T and u = h Wu^T, weights [out, in] (Shazeer 2020, eq. 6).
        """
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
        """Return RMSNorm ``x / sqrt(mean(x^2) + eps) * weight`` [D], in a buffer that is reused."""
        np.multiply(x, weight, out=self.h)
        self.h *= 1 / math.sqrt(float(x.dot(x)) / len(x) + self.eps)
        return self.h

    def _matvec(self, weight: Array, x: Array, out: Array) -> None:
        """Store the product of ``weight`` [..., n] and ``x`` [n] in ``out`` [...]."""
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
    """Return a NumPy view of a CPU tensor."""
    return tensor.detach().numpy()


def _layer(block: Block, head_dim: int, keys: Array, values: Array) -> _Layer:
    """Return views of a block's weights, and of its cache [1, N, S, K]."""
    attention, mlp = block.self_attn, block.mlp

    def heads(projection: nn.Linear) -> Array:
        """Return the weight [heads, K, D] of a projection [heads K, D]."""
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
