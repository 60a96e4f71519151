"""The decoding step of one sequence as Triton kernels, launched one after the other."""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor, nn

from ..kernels import decode
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from ..model.rope import rope_tables

MOST_SHARES = 64  # of a head's keys: one warp joins them
KEYS = 32  # that such a program reads at a time
# Rows, columns (of int8, words of four) and warps of a program: the quickest of some ten tried for
# each on one H200, with the 7B shape ("wide", "int8") and the 1.1B shape ("narrow").
TILES = {
    "wide": {"qkv": (2, 4096, 8), "ffn": (2, 4096, 4), "one": (8, 1024, 2)},
    "narrow": {"qkv": (2, 1024, 4), "ffn": (4, 1024, 4), "one": (4, 1024, 2)},
    "int8": {"qkv": (4, 256, 2), "ffn": (4, 512, 4), "one": (4, 256, 2)},
}


class KernelStep:
    """The kernels of one step and the arrays between them; see decode.py.

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
        self.planes = self._planes()
        self.single = self.common | {"PLANES": self.planes}  # for those of decode.py
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

    def _planes(self) -> int:
        """Return 4 where int8 weights can be read as words of four, else 1."""
        c = self.config
        is_int8 = any(hasattr(module, "scale") for module in self.model.modules())
        return 4 if is_int8 and not any(n % 4 for n in (c.dim, c.hidden_dim, c.head_dim)) else 1

    def _make_room(self) -> None:
        norms = [module for module in self.model.modules() if isinstance(module, nn.RMSNorm)]
        self.norms = {norm: norm.weight for norm in norms}
        if self.planes > 1:
            self.in_planes = self._floats(len(norms), self.config.dim)
            self.norms = dict(zip(norms, self.in_planes, strict=True))
        self.mixed = self._floats(self.q.shape[1])
        self.hidden = self._floats(self.config.hidden_dim)

    def begin(self) -> None:
        """Take over what may have changed since the last request: norms, where they are copied."""
        if self.planes > 1:
            weights = torch.stack([norm.weight.detach() for norm in self.norms])
            in_order = weights.view(len(weights), -1, self.planes).transpose(1, 2)
            self.in_planes.view_as(in_order).copy_(in_order)

    def run(self) -> None:
        """Launch the step's kernels."""
        c, model = self.config, self.model.model
        self._look_up()
        layer: Any
        for i, layer in enumerate(model.layers):
            self._attention(i, layer)
            gate, up = self._held(layer.mlp.gate_proj), self._held(layer.mlp.up_proj)
            tile = self._tile("ffn", layer.mlp.gate_proj)
            decode.norm_swiglu[(-(-c.hidden_dim // tile["ROWS"]),)](
                self.stream, self.norms[layer.post_attention_layernorm], gate[0], up[0],
                gate[1], up[1], self.hidden, c.norm_eps, c.dim, c.hidden_dim,
                QUANTIZED=gate[2], **tile, **self.single,
            )  # fmt: skip
            self._project_add(layer.mlp.down_proj, self.hidden)
        head: nn.Module = model.embed_tokens if c.tie_embeddings else self.model.lm_head
        w, scale, quantized = self._held(head)
        tile = self._tile("one", head)
        decode.norm_project[(-(-c.vocab_size // tile["ROWS"]),)](
            self.stream, self.norms[model.norm], w, scale, self.logits, c.norm_eps, c.dim,
            c.vocab_size, QUANTIZED=quantized, **tile, **self.single,
        )  # fmt: skip

    def _look_up(self) -> None:
        dim = self.config.dim
        block = power(dim, 1024)
        table = self.model.model.embed_tokens.weight
        decode.look_up[(-(-dim // block), self.rows)](
            table, self.token, self.stream, dim, block, **self.single
        )

    def _attention(self, i: int, layer: Any) -> None:
        c, attention = self.config, layer.self_attn
        keys, values = self.cache.keys[i], self.cache.values[i]
        half = c.head_dim // 2
        # Rows of one head: as many as a power of two that divides it.
        tile = self._tile("qkv", attention.q_proj, half & -half)
        pairs = (c.n_heads + 2 * c.n_kv_heads) * half
        q, k, v = (self._held(getattr(attention, f"{name}_proj")) for name in "qkv")
        decode.norm_qkv_rope[(pairs // tile["ROWS"],)](
            self.stream, self.norms[layer.input_layernorm], q[0], k[0], v[0], q[1], k[1], v[1],
            self.cos, self.sin, self.position, self.column, self.q, keys, values,
            self.cache.size, c.norm_eps, c.dim, c.n_heads, c.n_kv_heads, c.head_dim,
            QUANTIZED=q[2], **tile, **self.single,
        )  # fmt: skip
        self._attend(i)
        self._project_add(attention.o_proj, self.mixed)

    def _attend(self, i: int) -> None:
        c = self.config
        decode.attend[(self.rows * c.n_heads, self.shares)](
            self.q, self.cache.keys[i], self.cache.values[i], self.allowed, self.column,
            *self.parts, self.arrived, self.mixed, self.cache.size, 1 / math.sqrt(c.head_dim),
            c.n_heads, c.n_heads // c.n_kv_heads, c.head_dim, power(c.head_dim), KEYS,
            self.shares, power(self.shares), num_warps=1, **self.single,
        )  # fmt: skip

    def _project_add(self, linear: Any, x: Tensor) -> None:
        n_out, n_in = linear.weight.shape
        w, scale, quantized = self._held(linear)
        tile = self._tile("one", linear)
        decode.project_add[(-(-n_out // tile["ROWS"]),)](
            x, w, scale, self.stream, n_in, n_out, QUANTIZED=quantized, **tile, **self.single
        )

    def _tile(self, kind: str, linear: nn.Module, most_rows: int = 1 << 30) -> dict[str, int]:
        w, _, quantized = self._held(linear)
        width = "int8" if quantized else "wide" if self.config.dim >= 4096 else "narrow"
        rows, block, warps = TILES[width][kind]
        tile = {"ROWS": min(rows, most_rows), "BLOCK": power(w.shape[1], block)}
        return tile | {"num_warps": warps}

    def _held(self, linear: nn.Module) -> tuple[Tensor, Tensor, bool]:
        """Return what ``held`` does, int8 in words of as many as there are planes."""
        w, scale, quantized = held(linear)
        return (w.view(torch.int32) if quantized and self.planes > 1 else w), scale, quantized

    def _floats(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.sums, device=self.device)


def power(n: int, most: int = 1 << 30) -> int:
    """Return the smallest power of two that is at least n, or ``most``."""
    return min(1 << (n - 1).bit_length(), most)


def held(linear: Any) -> tuple[Tensor, Tensor, bool]:
    """Return a matrix as it is held, its scales (any tensor if it has none), whether it has."""
    scale = getattr(linear, "scale", None)
    return linear.weight, linear.weight if scale is None else scale, scale is not None
