"""Names and shapes of the parameters; names and axes of the activations.

Axes: B batch, T query position, D dim, H query heads, N key/value heads, K head_dim,
F hidden_dim, V vocabulary.
"""

import re
from collections.abc import Iterator

from .config import LlamaConfig

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SCORE = "score.weight"  # the scalar head [1, D] of a reward model

# Buffers that old Hugging Face checkpoints store although the config determines them.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"

_IN_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,9})\.(.*)")


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's parameters, by their names below ``model.layers.{i}.``.

    Matrices are stored [out, in]: ``y = x @ W.T``.
    """
    dim, hidden = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "input_layernorm.weight": (dim,),
        "self_attn.q_proj.weight": (queries, dim),
        "self_attn.k_proj.weight": (keys, dim),
        "self_attn.v_proj.weight": (keys, dim),
        "self_attn.o_proj.weight": (dim, queries),
        "post_attention_layernorm.weight": (dim,),
        "mlp.gate_proj.weight": (hidden, dim),
        "mlp.up_proj.weight": (hidden, dim),
        "mlp.down_proj.weight": (dim, hidden),
    }


def outer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters around the layers, by name, in model order.

    With tied embeddings there is no ``lm_head.weight``: the head is the embedding.
    """
    matrix = config.vocab_size, config.dim
    head = {} if config.tie_embeddings else {LM_HEAD: matrix}
    return {EMBED: matrix, NORM: (config.dim,), **head}


def named_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every parameter's Hugging Face name and shape, in model order."""
    embedding, *last = outer_shapes(config).items()
    yield embedding
    layer_parameters = layer_shapes(config).items()
    for layer in range(config.n_layers):
        for name, shape in layer_parameters:
            yield f"model.layers.{layer}.{name}", shape
    yield from last


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's shape by its Hugging Face name, in model order."""
    return dict(named_shapes(config))


def parameter_shape(config: LlamaConfig, name: str) -> tuple[int, ...] | None:
    """Return the shape of the parameter of a Hugging Face name, None if the model has none such.

    It takes no longer for more layers.
    """
    in_layer = _IN_LAYER.fullmatch(name)
    if in_layer is None:
        return outer_shapes(config).get(name)
    has_layer = int(in_layer[1]) < config.n_layers
    return layer_shapes(config).get(in_layer[2]) if has_layer else None


# One layer's activations in the order they are computed.
LAYER_AXES = {
    "attn_norm": "BTD",  # input RMSNorm
    "q": "BTHK",  # before RoPE
    "k": "BTNK",
    "v": "BTNK",
    "q_rope": "BTHK",  # after RoPE
    "k_rope": "BTNK",
    "attn": "BTHK",  # softmax(scores) v, before o_proj
    "attn_proj": "BTD",  # after o_proj
    "attn_residual": "BTD",  # block input + attn_proj
    "ffn_norm": "BTD",  # post-attention RMSNorm
    "gate": "BTF",
    "up": "BTF",
    "ffn": "BTF",  # silu(gate) * up
    "ffn_proj": "BTD",  # after down_proj
    "residual": "BTD",  # attn_residual + ffn_proj, the block's output
}


def activation_axes(config: LlamaConfig) -> dict[str, str]:
    """Return every activation's axes by its name, in model order."""
    axes = {"embed": "BTD"}
    for layer in range(config.n_layers):
        for name, letters in LAYER_AXES.items():
            axes[f"layers.{layer}.{name}"] = letters
    return {**axes, "norm": "BTD", "logits": "BTV"}
