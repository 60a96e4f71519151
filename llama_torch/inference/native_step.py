"""The decoding step on the CPU in one compiled call a token, for one row or a few.

The C code reads the model's weights and writes the cache in place. Weights in bfloat16 are read as
they are; activations are float32 then, and so are the logits.
"""

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..model.embedding import Embedding
from ..model.kv_cache import StaticCache
from ..model.llama import Block, Llama
from ..model.rope import rope_tables
from .native_library import BITS, load

MAX_ROWS = 32  # with more, matrix products of several rows at a time are quicker

# The fields of decode_cpu.c's structures, in their order.
LAYER = "attn_norm q k v o ffn_norm gate up down keys values"
SIZES = (
    "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size rows columns slot n_threads "
    "widest"
)
POINTERS = (
    "layers embed norm head cos sin tokens padding x normed qkv mixed gate up scores packed logits"
)


class _Layer(ctypes.Structure):
    """decode_cpu.c's Layer: a block's weights and its layer of the cache."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in LAYER.split())


class _Step(ctypes.Structure):
    """decode_cpu.c's Step: all that one call reads and writes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES.split()),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
    )


class NativeStep:
    """Decoding step of up to MAX_ROWS rows: a DecodeStep, see decoding.py.

    Reads the model's weights by their addresses: they must not be replaced while the step is in
    use.
    """

    is_captured = False

    def __init__(self, model: Llama, cache: StaticCache) -> None:
        weight = model.model.embed_tokens.weight
        decode = load(weight.dtype)
        assert decode is not None
        self._decode, self.cache, self.model = decode, cache, model
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        cos, sin = rope_tables(torch.arange(cache.size)[None], model.config, self.dtype)
        # Tables [S, K] for both halves of a head: x' = x cos + swapped(x) (-sin, sin).
        self.cos = torch.cat([cos[0, :, 0], cos[0, :, 0]], dim=1)
        self.sin = torch.cat([-sin[0, :, 0], sin[0, :, 0]], dim=1)
        self.n_threads = torch.get_num_threads()
        self.begin([0] * cache.keys.shape[1])

    @staticmethod
    def supports(model: Llama, rows: int) -> bool:
        """Return whether the layers are plain, on a CPU and in one dtype, and C can be compiled."""
        weights = list(model.parameters())
        plain = (nn.Linear, Embedding, nn.RMSNorm)
        return (
            rows <= MAX_ROWS
            and all(type(m) in plain for m in model.modules() if not list(m.children()))
            and len({weight.dtype for weight in weights}) == 1
            and weights[0].dtype in BITS
            # A tensor of a type of its own, as a sharded one, need not lie at its address.
            and all(type(w) in (nn.Parameter, Tensor) for w in weights)
            and all(w.device.type == "cpu" and w.is_contiguous() for w in weights)
            and load(weights[0].dtype) is not None
        )

    def begin(self, padding: Sequence[int]) -> None:
        """Continue after the cache's last column; row i has ``padding[i]`` columns of padding.

        The cache's rows may be others than before, in other memory.
        """
        c, cache, rows = self.model.config, self.cache, len(padding)
        assert rows == cache.keys.shape[1]
        assert min(padding) >= 0
        assert cache.keys.is_contiguous()
        assert cache.values.is_contiguous()
        self.padding = torch.tensor(padding, dtype=torch.int64)
        widest = rows * max(c.dim, c.hidden_dim, c.n_heads * c.head_dim)
        qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        threads, hidden = self.n_threads, rows * c.hidden_dim
        sizes = (
            *(rows * c.dim, threads * rows * c.dim, rows * qkv, rows * c.n_heads * c.head_dim),
            *(hidden, hidden, threads * cache.size, threads * widest),
        )
        self.buffers = [torch.empty(size, dtype=self.dtype) for size in sizes]
        self.layers = (_Layer * c.n_layers)(
            *(
                _layer(cast(Block, block), cache.keys[i], cache.values[i])
                for i, block in enumerate(self.model.model.layers)
            )
        )
        decoder = self.model.model
        tensors = (
            *(decoder.embed_tokens.weight, decoder.norm.weight, self.model.head_weight),
            *(self.cos, self.sin),
        )
        self.step = _Step(
            *(c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_dim, c.vocab_size),
            *(rows, cache.size, 0, self.n_threads, widest, c.norm_eps),
            *(ctypes.addressof(self.layers), *map(_address, tensors), None, _address(self.padding)),
            *map(_address, self.buffers),
        )

    def close(self) -> None:
        """Do nothing: no step is kept for later requests."""

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token a row, int64 [B]; write keys and values.

        Raises IndexError for a token outside the vocabulary, before anything is written.
        """
        step, tokens_B = self.step, tokens_B.contiguous()
        assert tokens_B.dtype == torch.int64
        assert len(tokens_B) == step.rows
        assert self.cache.length < self.cache.size
        logits_BV = torch.empty(step.rows, step.vocab_size, dtype=self.dtype)
        step.tokens, step.logits = _address(tokens_B), _address(logits_BV)
        step.slot = self.cache.length
        if self._decode(ctypes.addressof(step)):
            raise IndexError(f"a token of {tokens_B.tolist()} is not below {step.vocab_size}")
        self.cache.length += 1
        return logits_BV


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _layer(block: Block, keys: Tensor, values: Tensor) -> _Layer:
    """Return the addresses of a block's weights, and of its cache [B, N, S, K]."""
    attention, mlp = block.self_attn, block.mlp
    tensors = (
        block.input_layernorm.weight,
        *(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        *(attention.o_proj.weight, block.post_attention_layernorm.weight),
        *(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, keys, values),
    )
    return _Layer(*map(_address, tensors))
