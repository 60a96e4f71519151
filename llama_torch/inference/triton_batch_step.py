"""The decoding step of several sequences in Triton kernels; see kernels/decode_batch.py."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import decode_batch
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from .step_inputs import StepInputs
from .triton_step import TritonBuffers, matrix_of, next_power_of_2

# Rows of a program; bytes of an input that it reads at a time (and as many weights of each row as
# these are elements); and tiles being read ahead: the quickest of a dozen tried on one H100 with
# the 7B shape and 32 sequences, bfloat16 and int8.
ROWS, READ_BYTES, STAGES = 64, 256, 5
SPLITS = (1, 2, 4)  # parts of a matrix's columns, if it has too few rows to occupy the GPU
PROGRAMS = 2048  # attention programs wanted: several sequences have more keys than one


class TritonBatchStep:
    """Forward pass of up to decoding.MAX_KERNEL_BATCH sequences' tokens in Triton kernels.

    A Forward, as TritonStep is, with a token, a position and a row of ``key_mask`` for each
    sequence.
    """

    def __init__(
        self,
        model: Llama,
        cache: StaticCache,
        inputs: StepInputs,
        key_mask: Tensor | None = None,
        n_positions: int = 0,
    ) -> None:
        self.model, self.config = model, model.config
        self.buffers = buffers = TritonBuffers(
            model, cache, inputs, key_mask, n_positions, PROGRAMS
        )
        c, self.rows, dtype = self.config, buffers.rows, buffers.dtype
        # 16 are the fewest that the tensor cores take.
        self.padded_rows = next_power_of_2(max(self.rows, 16))
        self.attn_out, self.hidden, self.normed = (
            torch.zeros(self.padded_rows, n, dtype=dtype, device=buffers.device)
            for n in (buffers.q.shape[1], c.hidden_dim, c.dim)
        )
        self.block = READ_BYTES // dtype.itemsize
        self.stages, self.n_multiprocessors = STAGES, 1
        if buffers.is_gpu:
            properties: Any = torch.cuda.get_device_properties(buffers.device)
            # The sums pass through shared memory at the end; the rest of it is for tiles.
            sum_bytes = ROWS * self.padded_rows * buffers.acc_dtype.itemsize
            free_bytes = properties.shared_memory_per_block_optin - sum_bytes
            self.stages = max(
                1, min(STAGES, free_bytes // ((ROWS + self.padded_rows) * READ_BYTES))
            )
            self.n_multiprocessors = properties.multi_processor_count
        widths = buffers.q.shape[1] + 2 * c.n_kv_heads * c.head_dim, 2 * c.hidden_dim, c.dim
        self.partial_sums = buffers.zeros(max(SPLITS), self.rows, max(widths))

    def copy_weights(self) -> None:
        """Do nothing: the kernels read every weight in place."""

    def launch(self) -> Tensor:
        """Launch the kernels of a forward pass; return the logits [B, 1, V]."""
        c, model, buffers = self.config, self.model.model, self.buffers
        inputs = buffers.inputs
        buffers.look_up()
        splits = 0
        layer: Any
        for i, layer in enumerate(model.layers):
            self._norm(layer.input_layernorm, splits)
            attention = layer.self_attn
            splits = self._project(
                self.normed, attention.q_proj, attention.k_proj, attention.v_proj
            )
            decode_batch.rope[(self.rows, c.n_heads + 2 * c.n_kv_heads)](
                self.partial_sums, buffers.cos, buffers.sin, inputs.positions,
                inputs.cache_position, buffers.q, buffers.cache.keys[i], buffers.cache.values[i],
                self.rows, buffers.cache.size, c.n_heads, c.n_kv_heads, c.head_dim,
                next_power_of_2(c.head_dim // 2), splits, num_warps=1, **buffers.common_options,
            )  # fmt: skip
            buffers.attend(i, self.attn_out)
            splits = self._project(self.attn_out, attention.o_proj)
            self._norm(layer.post_attention_layernorm, splits)
            splits = self._project(self.normed, layer.mlp.gate_proj, layer.mlp.up_proj)
            block = next_power_of_2(c.hidden_dim, 1024)
            decode_batch.swiglu[(self.rows, -(-c.hidden_dim // block))](
                self.partial_sums, self.hidden, self.rows, c.hidden_dim, block, splits,
                **buffers.launch_options,
            )  # fmt: skip
            splits = self._project(self.hidden, layer.mlp.down_proj)
        self._norm(model.norm, splits)
        head: nn.Module = model.embed_tokens if c.tie_embeddings else self.model.lm_head
        self._project(self.normed, head, out=buffers.logits)
        return buffers.logits[:, None]

    def _norm(self, norm: nn.RMSNorm, splits: int) -> None:
        """Add the last product, of so many splits (0: none), to the residual stream; norm that."""
        c, buffers = self.config, self.buffers
        decode_batch.add_norm[(self.rows,)](
            buffers.residual, self.partial_sums, norm.weight, self.normed, self.rows, c.norm_eps,
            c.dim, next_power_of_2(c.dim), splits, num_warps=8, **buffers.common_options,
        )  # fmt: skip

    def _project(self, x: Tensor, *linears: nn.Module, out: Tensor | None = None) -> int:
        """Store x's products with up to three matrices; return the number of splits.

        They are stored side by side: partial sums [splits, B, N_A + N_B + N_C] in
        ``partial_sums``, or sums in ``out``.
        """
        matrices = [matrix_of(linear) for linear in linears]
        weights = [matrix.weight for matrix in matrices]
        n_in = weights[0].shape[1]
        n_outs = [len(w) for w in weights] + [0] * (3 - len(weights))
        programs = sum(-(-n // ROWS) for n in n_outs)
        # A program occupies a multiprocessor: the time is the number of rounds of programs over
        # all multiprocessors, each round 1 / splits long.
        splits = min(
            (1,) if out is not None else SPLITS,
            key=lambda splits: -(-programs * splits // self.n_multiprocessors) / splits,
        )
        n_unused = 3 - len(matrices)  # of the kernel's arguments
        scales = [matrix.scale for matrix in matrices]
        weights, scales = weights + weights[:1] * n_unused, scales + scales[:1] * n_unused
        decode_batch.project[(programs, splits)](
            x, *weights, *scales, self.partial_sums if out is None else out, self.rows, n_in,
            *n_outs, self.padded_rows, ROWS, self.block, self.stages, splits,
            QUANTIZED=matrices[0].is_int8, num_warps=4, **self.buffers.common_options,
        )  # fmt: skip
        return splits
