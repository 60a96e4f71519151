"""The decoding step of one sequence in Triton kernels, and the buffers of steps of any batch.

Names: B sequence, D dim, H query heads, K head_dim, S key position (cache column), V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor, nn

from ..kernels import decode
from ..model.int8_linear import Int8Linear
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from ..model.rope import rope_tables
from .step_inputs import StepInputs

MAX_SPLITS = 64  # programs among which the keys of one head are split: one warp joins their results
KEYS_PER_BLOCK = 32  # keys that an attention program reads at a time
PROGRAMS = 512  # attention programs wanted: four for each multiprocessor of the largest GPUs
# Rows, columns (of int8, words of four) and warps of a program: the quickest of some ten tried for
# each on one H200, with the 7B shape ("wide", "int8") and the 1.1B shape ("narrow"). "one" is a
# kernel of one matrix.
TILES = {
    "wide": {"qkv": (2, 4096, 8), "ffn": (2, 4096, 4), "one": (8, 1024, 2)},
    "narrow": {"qkv": (2, 1024, 4), "ffn": (4, 1024, 4), "one": (4, 1024, 2)},
    "int8": {"qkv": (4, 256, 2), "ffn": (4, 512, 4), "one": (4, 256, 2)},
}


class TritonBuffers:
    """Launch options, rotary tables and buffers of the Triton steps for one and several sequences.

    ``residual`` [B, D], the residual stream, the queries ``q`` [B, H K] and ``logits`` [B, V] are
    in ``acc_dtype``: float32, or float64 for float64 weights.

    inputs       tokens, positions and cache position, one token a sequence.
    key_mask     bool [B, S], False on cache columns to hide; None: none. A token attends to
                 columns up to its own.
    n_positions  number of rotary positions, one more than the largest; 0: the cache's size.
    programs     number of attention programs wanted; more than one a head splits its keys.
    planes       number of planes of a kernel's input, see kernels/decode.py.
    """

    def __init__(
        self,
        model: Llama,
        cache: StaticCache,
        inputs: StepInputs,
        key_mask: Tensor | None = None,
        n_positions: int = 0,
        programs: int = PROGRAMS,
        planes: int = 1,
    ) -> None:
        self.cache, self.config, self.inputs, self.key_mask = cache, model.config, inputs, key_mask
        self.rows = rows = cache.keys.shape[1]
        config, self.embedding = model.config, model.model.embed_tokens.weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.acc_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        # Programmatic dependent launch, from compute capability 9 on: a kernel may begin before
        # the one before it has ended.
        self.is_gpu = self.device.type == "cuda"
        is_early = self.is_gpu and torch.cuda.get_device_capability(self.device)[0] >= 9
        self.launch_options: dict[str, Any] = {"PDL": is_early} | (
            {"launch_pdl": True} if is_early else {}
        )
        # Triton's name of the dtype: torch.float32 -> tl.float32.
        self.common_options = self.launch_options | {"sums": getattr(tl, str(self.acc_dtype)[6:])}
        # For the kernels of kernels/decode.py.
        self.decode_options = self.common_options | {"PLANES": planes}
        positions = torch.arange(n_positions or cache.size, device=self.device)
        cos, sin = rope_tables(positions[None], config, self.dtype)
        self.cos, self.sin = cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()
        self.residual = self.zeros(rows, config.dim)
        self.q = self.zeros(rows, config.n_heads * config.head_dim)
        self.logits = self.zeros(rows, config.vocab_size)
        heads = rows * config.n_heads
        wanted_splits = min(-(-programs // heads), MAX_SPLITS)
        self.n_splits = min(wanted_splits, -(-cache.size // KEYS_PER_BLOCK))
        n_parts = heads * self.n_splits
        self.split_results = (
            self.zeros(n_parts, config.head_dim),
            self.zeros(n_parts),
            self.zeros(n_parts),
        )
        self.splits_done = torch.zeros(heads, dtype=torch.int32, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros of a shape, in ``acc_dtype``."""
        return torch.zeros(*shape, dtype=self.acc_dtype, device=self.device)

    def look_up(self) -> None:
        """Store the tokens' embeddings in the residual stream [B, D]."""
        dim = self.config.dim
        block = next_power_of_2(dim, 1024)
        decode.look_up[(-(-dim // block), self.rows)](
            self.embedding, self.inputs.tokens, self.residual, dim, block, **self.decode_options
        )

    def attend(self, i: int, out: Tensor) -> None:
        """Store the attention output [B, H K] of ``q`` over layer ``i`` of the cache in ``out``.

        Keys and values are those up to the step's cache position.
        """
        c = self.config
        decode.attend[(self.rows * c.n_heads, self.n_splits)](
            self.q, self.cache.keys[i], self.cache.values[i], self.key_mask,
            self.inputs.cache_position, *self.split_results, self.splits_done, out,
            self.cache.size, 1 / math.sqrt(c.head_dim), c.n_heads, c.n_heads // c.n_kv_heads,
            c.head_dim, next_power_of_2(c.head_dim), KEYS_PER_BLOCK, self.n_splits,
            next_power_of_2(self.n_splits), num_warps=1, **self.decode_options,
        )  # fmt: skip


class TritonStep:
    """Forward pass of one sequence's token in Triton kernels: a Forward, see cuda_graph.py.

    ``launch`` reads token, position and cache position of the inputs, and writes that column of
    the cache, and the logits. The kernels are those of kernels/decode.py; the arguments those of
    TritonBuffers.
    """

    def __init__(
        self,
        model: Llama,
        cache: StaticCache,
        inputs: StepInputs,
        key_mask: Tensor | None = None,
        n_positions: int = 0,
    ) -> None:
        self.model, self.config, self.planes = model, model.config, count_planes(model)
        self.buffers = buffers = TritonBuffers(
            model, cache, inputs, key_mask, n_positions, PROGRAMS, self.planes
        )
        norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
        self.norms = {norm: norm.weight for norm in norms}
        if self.planes > 1:
            self.norms_in_planes = buffers.zeros(len(norms), self.config.dim)
            self.norms = dict(zip(norms, self.norms_in_planes, strict=True))
        self.attn_out = buffers.zeros(buffers.q.shape[1])
        self.hidden = buffers.zeros(self.config.hidden_dim)

    def copy_weights(self) -> None:
        """Copy the norms' weights, which may have changed, into the planes of int8 kernels."""
        if self.planes > 1:
            weights = torch.stack([norm.weight.detach() for norm in self.norms])
            in_order = weights.view(len(weights), -1, self.planes).transpose(1, 2)
            self.norms_in_planes.view_as(in_order).copy_(in_order)

    def launch(self) -> Tensor:
        """Launch the kernels of a forward pass; return the logits [1, 1, V]."""
        c, model, buffers = self.config, self.model.model, self.buffers
        buffers.look_up()
        layer: Any
        for i, layer in enumerate(model.layers):
            self._attention(i, layer)
            self._feed_forward(layer)
        head: nn.Module = model.embed_tokens if c.tie_embeddings else self.model.lm_head
        matrix = self._matrix(head)
        tile = self._tile("one", head)
        decode.norm_project[(-(-c.vocab_size // tile["ROWS"]),)](
            buffers.residual, self.norms[model.norm], matrix.weight, matrix.scale, buffers.logits,
            c.norm_eps, c.dim, c.vocab_size, QUANTIZED=matrix.is_int8, **tile,
            **buffers.decode_options,
        )  # fmt: skip
        return buffers.logits[:, None]

    def _attention(self, i: int, layer: Any) -> None:
        """Add the attention block's output to the residual stream; write the cache."""
        c, attention, buffers = self.config, layer.self_attn, self.buffers
        keys, values = buffers.cache.keys[i], buffers.cache.values[i]
        half = c.head_dim // 2
        # A program's rows are of one head: at most the largest power of two that divides K / 2.
        tile = self._tile("qkv", attention.q_proj, half & -half)
        pairs = (c.n_heads + 2 * c.n_kv_heads) * half
        q, k, v = (self._matrix(getattr(attention, f"{name}_proj")) for name in "qkv")
        decode.norm_qkv_rope[(pairs // tile["ROWS"],)](
            buffers.residual, self.norms[layer.input_layernorm], q.weight, k.weight, v.weight,
            q.scale, k.scale, v.scale, buffers.cos, buffers.sin, buffers.inputs.positions,
            buffers.inputs.cache_position, buffers.q, keys, values, buffers.cache.size,
            c.norm_eps, c.dim, c.n_heads, c.n_kv_heads, c.head_dim, QUANTIZED=q.is_int8, **tile,
            **buffers.decode_options,
        )  # fmt: skip
        buffers.attend(i, self.attn_out)
        self._project_add(attention.o_proj, self.attn_out)

    def _feed_forward(self, layer: Any) -> None:
        """Add the feed-forward block's output to the residual stream."""
        c, buffers = self.config, self.buffers
        gate, up = self._matrix(layer.mlp.gate_proj), self._matrix(layer.mlp.up_proj)
        tile = self._tile("ffn", layer.mlp.gate_proj)
        decode.norm_swiglu[(-(-c.hidden_dim // tile["ROWS"]),)](
            buffers.residual, self.norms[layer.post_attention_layernorm], gate.weight, up.weight,
            gate.scale, up.scale, self.hidden, c.norm_eps, c.dim, c.hidden_dim,
            QUANTIZED=gate.is_int8, **tile, **buffers.decode_options,
        )  # fmt: skip
        self._project_add(layer.mlp.down_proj, self.hidden)

    def _project_add(self, linear: Any, x: Tensor) -> None:
        """Add the product of a layer's matrix and ``x`` to the residual stream."""
        n_out, n_in = linear.weight.shape
        matrix = self._matrix(linear)
        tile = self._tile("one", linear)
        decode.project_add[(-(-n_out // tile["ROWS"]),)](
            x, matrix.weight, matrix.scale, self.buffers.residual, n_in, n_out,
            QUANTIZED=matrix.is_int8, **tile, **self.buffers.decode_options,
        )  # fmt: skip

    def _tile(self, kind: str, linear: nn.Module, max_rows: int = 1 << 30) -> dict[str, int]:
        """Return the rows, columns and warps of a program for a layer's matrix, from TILES."""
        matrix = self._matrix(linear)
        width = "int8" if matrix.is_int8 else "wide" if self.config.dim >= 4096 else "narrow"
        rows, block, warps = TILES[width][kind]
        tile = {
            "ROWS": min(rows, max_rows),
            "BLOCK": next_power_of_2(matrix.weight.shape[1], block),
        }
        return tile | {"num_warps": warps}

    def _matrix(self, linear: nn.Module) -> "Matrix":
        """Return a layer's matrix; an int8 one as int32 words of four weights, with four planes."""
        matrix = matrix_of(linear)
        if matrix.is_int8 and self.planes > 1:
            return matrix._replace(weight=matrix.weight.view(torch.int32))
        return matrix


class Matrix(NamedTuple):
    """A layer's weight [out, in], with the scales [out] of an int8 weight (else unused)."""

    weight: Tensor
    scale: Tensor
    is_int8: bool


def matrix_of(linear: Any) -> Matrix:
    """Return the matrix of a linear layer, or of an embedding that is the output projection too."""
    if isinstance(linear, Int8Linear):
        return Matrix(linear.weight, linear.scale, True)
    return Matrix(linear.weight, linear.weight, False)


def count_planes(model: Llama) -> int:
    """Return 4 where int8 weights can be read as words of four, else 1; see kernels/decode.py."""
    c = model.config
    is_int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    return 4 if is_int8 and not any(n % 4 for n in (c.dim, c.hidden_dim, c.head_dim)) else 1


def next_power_of_2(n: int, limit: int = 1 << 30) -> int:
    """Return the smallest power of two that is at least n, or ``limit``."""
    return min(1 << (n - 1).bit_length(), limit)
