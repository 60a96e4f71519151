"""The decoding step of several sequences as Triton kernels; see decode_batch.py."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import decode_batch
from .triton_step import KernelStep, held, power

# Rows of a program, bytes of an input (as many weights of a row, whatever they are held in) that it
# reads at a time, and tiles under way: the quickest of a dozen tried on one H100 with the 7B shape
# and 32 sequences, bfloat16 and int8.
ROWS, READ, STAGES = 64, 256, 5
SPLITS = (1, 2, 4)  # shares of a matrix's columns, if it has too few rows to occupy the GPU


class BatchStep(KernelStep):
    """Several sequences, up to decoding.MOST_ROWS. See KernelStep."""

    programs = 2048  # of attention, which has much more to read here

    def _planes(self) -> int:
        return 1  # what the tensor cores multiply is in order

    def _make_room(self) -> None:
        c = self.config
        self.dtype = self.model.model.embed_tokens.weight.dtype
        self.padded = power(max(self.rows, 16))  # the fewest that the tensor cores take
        self.mixed, self.hidden, self.normed = (
            torch.zeros(self.padded, n, dtype=self.dtype, device=self.device)
            for n in (self.q.shape[1], c.hidden_dim, c.dim)
        )
        self.block = READ // self.dtype.itemsize
        self.stages, self.processors = STAGES, 1
        if self.is_gpu:
            properties: Any = torch.cuda.get_device_properties(self.device)
            sums = ROWS * self.padded * self.sums.itemsize  # pass through it at the end
            room = properties.shared_memory_per_block_optin - sums
            self.stages = max(1, min(STAGES, room // ((ROWS + self.padded) * READ)))
            self.processors = properties.multi_processor_count
        widths = self.q.shape[1] + 2 * c.n_kv_heads * c.head_dim, 2 * c.hidden_dim, c.dim
        self.shares_of = self._floats(max(SPLITS), self.rows, max(widths))

    def run(self) -> None:
        """Launch the step's kernels."""
        c, model = self.config, self.model.model
        self._look_up()
        splits = 0
        layer: Any
        for i, layer in enumerate(model.layers):
            self._norm(layer.input_layernorm, splits)
            attention = layer.self_attn
            splits = self._project(
                self.normed, attention.q_proj, attention.k_proj, attention.v_proj
            )
            decode_batch.rope[(self.rows, c.n_heads + 2 * c.n_kv_heads)](
                self.shares_of, self.cos, self.sin, self.position, self.column, self.q,
                self.cache.keys[i], self.cache.values[i], self.rows, self.cache.size, c.n_heads,
                c.n_kv_heads, c.head_dim, power(c.head_dim // 2), splits, num_warps=1,
                **self.common,
            )  # fmt: skip
            self._attend(i)
            splits = self._project(self.mixed, attention.o_proj)
            self._norm(layer.post_attention_layernorm, splits)
            splits = self._project(self.normed, layer.mlp.gate_proj, layer.mlp.up_proj)
            block = power(c.hidden_dim, 1024)
            decode_batch.swiglu[(self.rows, -(-c.hidden_dim // block))](
                self.shares_of, self.hidden, self.rows, c.hidden_dim, block, splits,
                **self.launch,
            )  # fmt: skip
            splits = self._project(self.hidden, layer.mlp.down_proj)
        self._norm(model.norm, splits)
        head: nn.Module = model.embed_tokens if c.tie_embeddings else self.model.lm_head
        self._project(self.normed, head, out=self.logits)

    def _norm(self, norm: nn.RMSNorm, splits: int) -> None:
        c = self.config
        decode_batch.add_norm[(self.rows,)](
            self.stream, self.shares_of, norm.weight, self.normed, self.rows, c.norm_eps,
            c.dim, power(c.dim), splits, num_warps=8, **self.common,
        )  # fmt: skip

    def _project(self, x: Tensor, *linears: nn.Module, out: Tensor | None = None) -> int:
        """Multiply by some matrices, into ``shares_of`` or ``out``; return the number of shares."""
        matrices = [held(linear) for linear in linears]
        weights = [w for w, _, _ in matrices]
        n_in = weights[0].shape[1]
        heights = [len(w) for w in weights] + [0] * (3 - len(weights))
        programs = sum(-(-n // ROWS) for n in heights)
        # A program occupies a multiprocessor: what counts is how often all of them take one.
        splits = min(
            (1,) if out is not None else SPLITS,
            key=lambda splits: -(-programs * splits // self.processors) / splits,
        )
        spare = 3 - len(matrices)  # of the kernel's arguments
        scales = [scale for _, scale, _ in matrices]
        weights, scales = weights + weights[:1] * spare, scales + scales[:1] * spare
        decode_batch.project[(programs, splits)](
            x, *weights, *scales, self.shares_of if out is None else out, self.rows, n_in,
            *heights, self.padded, ROWS, self.block, self.stages, splits,
            QUANTIZED=matrices[0][2], num_warps=4, **self.common,
        )  # fmt: skip
        return splits
