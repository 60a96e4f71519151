"""Stanford's Levanter: its Llama on JAX (Haliax, Equinox), and its converter.

Tested with levanter 1.2.dev1644, haliax 1.4.dev453 and jax 0.10.2 (``pip install --pre levanter``;
1.8 GB). Weights are mapped by ``from_torch_compatible_state_dict``, as its HFCheckpointConverter
maps them; positions and mask are inputs. Its cache is of pages, and causal.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

# Each shape of each operation is compiled once, which takes longer than to run it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax.state_dict import from_torch_compatible_state_dict
from levanter.compat.hf_checkpoints import HFCheckpointConverter
from levanter.inference.page_table import PageBatchInfo, PageTableSpec
from levanter.layers.attention import AttentionMask
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig, Llama3RotaryEmbeddingsConfig
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import PreTrainedTokenizerFast

from reference_np.limits import Limits

from . import jax_gradients

REQUIRES = (
    "levanter==1.2.dev1644",
    "haliax==1.4.dev453",
    "jax==0.10.2",
    "equinox==0.13.8",
    "transformers==4.57.6",
    "gitpython==3.2.1",  # which it imports and does not require, as the next
    "chex==0.1.92",
)
MINUTES = 20.0  # compiling
PAGES, SLOTS = 20, 16  # pages of a row, positions of a page
BLOCK = 1024  # positions


def rotary_of(config: Any) -> Any:
    both = config.rope_theta, config.rope_factor
    if config.rope_type != "llama3":
        return DefaultRotaryEmbeddingsConfig(*both)
    scaling = config.rope_low_freq_factor, config.rope_high_freq_factor
    return Llama3RotaryEmbeddingsConfig(*both, *scaling, config.rope_original_max_seq_len)


def built(config: Any, params: Any) -> Any:
    """Return the model with these parameters; differentiable in them."""
    given = LlamaConfig(
        seq_len=config.max_seq_len,
        hidden_dim=config.dim,
        intermediate_dim=config.hidden_dim,
        num_layers=config.n_layers,
        num_heads=config.n_heads,
        num_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope=rotary_of(config),
        gradient_checkpointing=False,
    )
    vocabulary = hax.Axis("vocab", config.vocab_size)
    key = jax.random.PRNGKey(0)
    template = eqx.filter_eval_shape(LlamaLMHeadModel.init, vocabulary, given, key=key)
    leaves = {name: jnp.asarray(value) for name, value in params.items()}
    return from_torch_compatible_state_dict(template, leaves)


def named(array: Any, *names: str) -> Any:
    return None if array is None else hax.named(jnp.asarray(array), names)


def logits_of(model: Any, tokens: Any, positions: Any, mask: Any) -> Any:
    if positions is not None:
        positions = named(positions.astype(np.int32), "batch", "position")
    attended = AttentionMask.causal()
    if mask is not None:
        attended = named(mask, "batch", "position", "key_position")
    tokens = named(tokens.astype(np.int32), "batch", "position")
    return model(tokens, attended, positions).rearrange(("batch", "position", "vocab")).array


@eqx.filter_jit
def appended(model: Any, tokens: Any, positions: Any, cache: Any, start: Any) -> Any:
    """Return the logits [B, T, V] of tokens after ``start`` others, and the cache."""
    rows, length = tokens.shape
    each = jnp.arange(rows, dtype=jnp.int32)
    slots = each[:, None] * PAGES * SLOTS + start + jnp.arange(length, dtype=jnp.int32)
    pages = each[:, None] * PAGES + jnp.arange(PAGES, dtype=jnp.int32)
    batch = PageBatchInfo(
        slot_ids=named(each, "seq"),
        page_indices=named(pages, "seq", "page"),
        seq_lens=named(jnp.full(rows, start + length, jnp.int32), "seq"),
        cu_q_lens=named(jnp.arange(rows + 1, dtype=jnp.int32) * length, "seq"),
        num_seqs=jnp.array(rows, jnp.int32),
        new_token_dests=named(slots.reshape(-1), "position"),
        page_size=SLOTS,
    )
    flat = (named(x.astype(np.int32).reshape(-1), "position") for x in (tokens, positions))
    logits, cache = model.decode(next(flat), cache, batch, next(flat))
    return logits.rearrange(("position", "vocab")).array.reshape(rows, length, -1), cache


called = eqx.filter_jit(logits_of)  # to compile it whole takes less time than its operations


class Port:
    """``LlamaLMHeadModel`` with its default attention, in blocks of 1,024 positions."""

    dtypes = ("float32", "bfloat16", "float16")
    limits = Limits(float32_angles=("float32", "bfloat16", "float16"))

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        model = built(config, params)
        return np.array(called(model, tokens, positions, mask).astype(jnp.float32))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        if mask is not None:
            raise NotImplementedError("its cache is causal")
        length, model = tokens.shape[1], built(config, params)
        if cache is None:
            spec, dtype = (
                PageTableSpec(len(tokens) * PAGES, SLOTS),
                next(iter(params.values())).dtype,
            )
            cache = model.initial_cache(spec, dtype=dtype), 0
        pages, start = cache
        if positions is None:
            positions = np.broadcast_to(np.arange(start, start + length), tokens.shape)
        logits, pages = appended(model, tokens, positions, pages, start)
        return np.array(logits.astype(jnp.float32)), (pages, start + length)

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        def logits(leaves: Any, *given: Any) -> Any:
            return logits_of(built(config, leaves), *given)

        return jax_gradients.loss_and_grads(logits, params, batches, z_loss)


class Directory:
    """``HFCheckpointConverter.load_pretrained``."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",  # which transformers' LlamaConfig requires
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=Port.limits.float32_angles,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
        # the tokenizer is of no use here, and the vocabulary is not changed to its size
        converter = HFCheckpointConverter(LlamaConfig, path, HuggingFaceConfig, words)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(mesh):
            model = converter.load_pretrained(
                LlamaLMHeadModel, dtype=getattr(jnp, dtype), resize_vocab_to_match_tokenizer=False
            )

        def logits(tokens: Any) -> Any:
            length = tokens.shape[1]
            if length > BLOCK:  # its attention wants whole blocks
                tokens = np.pad(tokens, ((0, 0), (0, -length % BLOCK)))
            return np.array(called(model, tokens, None, None)[:, :length].astype(jnp.float32))

        return logits
