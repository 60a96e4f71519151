"""The decoding step of one sequence as Triton kernels, launched one after the other."""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor, nn

from . import kernels
from .cache import StaticCache
from .model import Llama, rope_tables

MOST_SHARES = 64  # of a head's keys: one warp joins them
KEYS = 32  # that such a program reads at a time
# Rows, columns and warps of a program: the quickest of some ten tried for each on one H200, with
# the 7B shape ("wide", "int8") and the 1.1B shape ("narrow").
TILES = {
    "wide": {"qkv": (2, 4096, 8), "ffn": (2, 4096, 4), "one": (8, 1024, 2)},
    "narrow": {"qkv": (2, 1024, 4), "ffn": (4, 1024, 4), "one": (4, 1024, 2)},
    "int8": {"qkv": (8, 1024, 4), "ffn": (4, 2048, 4), "one": (4, 2048, 4)},
}


class KernelStep:
    """The kernels of one step and the arrays between them; see kernels.py.

    ``run`` reads ``token``, ``position`` (int64 [M]; one a row of the cache) and ``column`` (int64
    [1], the cache's column for them), and writes that column and ``logits`` [M, V]. ``allowed``
    (bool [M, S], or None: all) are the columns that the tokens may attend to, among those up to
    their own. ``n_positions`` is one more than the largest position. M is 1 here.
    """

    programs = 512  # of attention: four for each multiprocessor of the largest GPUs

    def __init__(
        self,
        model: Llama,
        cache: StaticCache,
        n_positions: int = 0,
        allowed: Tensor | None = None,
    ) -> None:
        self.model, self.cache, self.config, self.allowed = model, cache, model.config, allowed
        self.rows = rows = cache.keys.shape[1]
        config, weight = model.config, model.model.embed_tokens.weight
        self.device = weight.device
        is_double = weight.dtype == torch.float64
        self.sums = torch.float64 if is_double else torch.float32
        # A kernel may begin before its predecessor's end, from compute capability 9 on.
        self.is_gpu = self.device.type == "cuda"
        is_early = self.is_gpu and torch.cuda.get_device_capability(self.device)[0] >= 9
        self.launch: dict[str, Any] = {"PDL": is_early} | ({"launch_pdl": True} if is_early else {})
        self.common = self.launch | {"sums": getattr(tl, str(self.sums)[6:])}
        positions = torch.arange(n_positions or cache.size, device=self.device)
        cos, sin = rope_tables(positions[None], config, weight.dtype)
        self.cos, self.sin = cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()
        self.token, self.position, self.column = (
            torch.zeros(n, dtype=torch.int64, device=self.device) for n in (rows, rows, 1)
        )
        self.stream = self._floats(rows, config.dim)
        self.q = self._floats(rows, config.n_heads * config.head_dim)
        self.logits = self._floats(rows, config.vocab_size)
        heads = rows * config.n_heads
        wanted = min(-(-self.programs // heads), MOST_SHARES)
        self.shares = min(wanted, -(-cache.size // KEYS))
        parts = heads * self.shares
        self.parts = self._floats(parts, config.head_dim), self._floats(parts), self._floats(parts)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=self.device)
        self._make_room()

    def _make_room(self) -> None:
        self.mixed = self._floats(self.q.shape[1])
        self.hidden = self._floats(self.config.hidden_dim)

    def run(self) -> None:
        """Launch the step's kernels."""
        c, model = self.config, self.model.model
        self._look_up()
        layer: Any
        for i, layer in enumerate(model.layers):
            self._attention(i, layer)
            gate, up = held(layer.mlp.gate_proj), held(layer.mlp.up_proj)
            tile = self._tile("ffn", layer.mlp.gate_proj)
            kernels.norm_swiglu[(-(-c.hidden_dim // tile["ROWS"]),)](
                self.stream, layer.post_attention_layernorm.weight, gate[0], up[0],
                gate[1], up[1], self.hidden, c.norm_eps, c.dim, c.hidden_dim,
                QUANTIZED=gate[2], **tile, **self.common,
            )  # fmt: skip
            self._project_add(layer.mlp.down_proj, self.hidden)
        head: nn.Module = model.embed_tokens if c.tie_embeddings else self.model.lm_head
        w, scale, quantized = held(head)
        tile = self._tile("one", head)
        kernels.norm_project[(-(-c.vocab_size // tile["ROWS"]),)](
            self.stream, model.norm.weight, w, scale, self.logits, c.norm_eps, c.dim,
            c.vocab_size, QUANTIZED=quantized, **tile, **self.common,
        )  # fmt: skip

    def _look_up(self) -> None:
        dim = self.config.dim
        block = power(dim, 1024)
        table = self.model.model.embed_tokens.weight
        kernels.look_up[(-(-dim // block), self.rows)](
            table, self.token, self.stream, dim, block, **self.common
        )

    def _attention(self, i: int, layer: Any) -> None:
        c, attention = self.config, layer.self_attn
        keys, values = self.cache.keys[i], self.cache.values[i]
        half = c.head_dim // 2
        # Rows of one head: as many as a power of two that divides it.
        tile = self._tile("qkv", attention.q_proj, half & -half)
        pairs = (c.n_heads + 2 * c.n_kv_heads) * half
        q, k, v = (held(getattr(attention, f"{name}_proj")) for name in "qkv")
        kernels.norm_qkv_rope[(pairs // tile["ROWS"],)](
            self.stream, layer.input_layernorm.weight, q[0], k[0], v[0], q[1], k[1], v[1],
            self.cos, self.sin, self.position, self.column, self.q, keys, values,
            self.cache.size, c.norm_eps, c.dim, c.n_heads, c.n_kv_heads, c.head_dim,
            QUANTIZED=q[2], **tile, **self.common,
        )  # fmt: skip
        self._attend(i)
        self._project_add(attention.o_proj, self.mixed)

    def _attend(self, i: int) -> None:
        c = self.config
        kernels.attend[(self.rows * c.n_heads, self.shares)](
            self.q, self.cache.keys[i], self.cache.values[i], self.allowed, self.column,
            *self.parts, self.arrived, self.mixed, self.cache.size, 1 / math.sqrt(c.head_dim),
            c.n_heads, c.n_heads // c.n_kv_heads, c.head_dim, power(c.head_dim), KEYS,
            self.shares, power(self.shares), num_warps=1, **self.common,
        )  # fmt: skip

    def _project_add(self, linear: nn.Module, x: Tensor) -> None:
        w, scale, quantized = held(linear)
        n_out, n_in = w.shape
        tile = self._tile("one", linear)
        kernels.project_add[(-(-n_out // tile["ROWS"]),)](
            x, w, scale, self.stream, n_in, n_out, QUANTIZED=quantized, **tile, **self.common
        )

    def _tile(self, kind: str, linear: nn.Module, most_rows: int = 1 << 30) -> dict[str, int]:
        w, _, quantized = held(linear)
        width = "int8" if quantized else "wide" if self.config.dim >= 4096 else "narrow"
        rows, block, warps = TILES[width][kind]
        tile = {"ROWS": min(rows, most_rows), "BLOCK": power(w.shape[1], block)}
        return tile | {"num_warps": warps}

    def _floats(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.sums, device=self.device)


def power(n: int, most: int = 1 << 30) -> int:
    """Return the smallest power of two that is at least n, or ``most``."""
    return min(1 << (n - 1).bit_length(), most)


def held(linear: Any) -> tuple[Tensor, Tensor, bool]:
    """Return a matrix as it is held, its scales (any tensor if it has none), whether it has."""
    scale = getattr(linear, "scale", None)
    return linear.weight, linear.weight if scale is None else scale, scale is not None
