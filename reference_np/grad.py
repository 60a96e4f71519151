"""Gradients by hand: a vector-Jacobian product for every operation and for the whole model.

Each ``*_vjp`` takes the inputs (or results) of its operation and ``d_out``, the loss's gradient
with respect to the operation's output, and returns the gradients with respect to its inputs.
For out = f(x) with Jacobian J, d_x = J^T d_out. Dtypes follow the inputs, as in ops.

Axes: B batch, T query position, S key position, D dim, H query heads, N key/value heads,
R query heads per key/value head, K head_dim, F hidden_dim, V vocabulary.
"""

import math
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from . import ops
from .config import LlamaConfig
from .model import Ops, forward, layer_params
from .naming import EMBED, LAYER_AXES, LM_HEAD, NORM
from .ops import IGNORE, Array

Grads = dict[str, Array]


def embed_vjp(weight_VD: Array, tokens_BT: Array, d_out_BTD: Array) -> Array:
    """Return d_W [V, D], where row v is the sum of d_out over every token v, as out = W[tokens]."""
    d_weight = np.zeros_like(weight_VD)
    np.add.at(d_weight, tokens_BT, d_out_BTD)  # adds repeated tokens; d_weight[t] += would not
    return d_weight


def linear_vjp(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
    """Return d_x = d_out W [..., in] and d_W = d_out^T x [out, in], as out = x W^T.

    d_W is summed over every leading axis.
    """
    flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_x: Array = (flat_d @ weight).reshape(x.shape)
    return d_x, flat_d.T @ flat_x


def rms_norm_vjp(x: Array, weight_D: Array, eps: float, d_out: Array) -> tuple[Array, Array]:
    """Return d_x [..., D] and d_w [D] of out = w n, n = x / r and r = sqrt(mean(x^2) + eps).

    dr/dx = x / (D r), so with g = w d_out: d_x = (g - n mean(g n)) / r, and d_w = sum(d_out n).
    """
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    n = x / r
    g = d_out * weight_D
    d_x: Array = (g - n * np.mean(g * n, axis=-1, keepdims=True)) / r
    d_weight: Array = (d_out * n).reshape(-1, x.shape[-1]).sum(axis=0)
    return d_x, d_weight


def apply_rope_vjp(cos: Array, sin: Array, d_out_BTHK: Array) -> Array:
    """Return d_x = R^T d_out [B, T, H, K], as out = R x; R^T is the rotation by -angle."""
    return ops.apply_rope(d_out_BTHK, cos, -sin)


def attention_scores_vjp(q_BNRTK: Array, k_BNSK: Array, d_out_BNRTS: Array) -> tuple[Array, Array]:
    """Return d_q = d_out k / sqrt(K) and d_k = sum over r of d_out^T q / sqrt(K).

    Shapes are those of q [B, N, R, T, K] and k [B, N, S, K], as out = q k^T / sqrt(K). R query
    heads read one key head, so its gradient is the sum over them.
    """
    batch, groups, repeats, length, width = q_BNRTK.shape
    d_rows = d_out_BNRTS.reshape(batch, groups, repeats * length, -1) * (1.0 / math.sqrt(width))
    rows = q_BNRTK.reshape(batch, groups, repeats * length, width)
    d_q: Array = (d_rows @ k_BNSK).reshape(q_BNRTK.shape)
    d_k: Array = d_rows.swapaxes(-1, -2) @ rows
    return d_q, d_k


def masked_softmax_vjp(weights_BNRTS: Array, d_out_BNRTS: Array) -> Array:
    """Return d_scores = p (d_out - sum(d_out p)) [B, N, R, T, S] from the weights p = out.

    As dp_i/ds_j = p_i (delta_ij - p_j). Where the mask is False, p is 0 and so is d_scores.
    """
    inner = np.sum(d_out_BNRTS * weights_BNRTS, axis=-1, keepdims=True)
    d_scores: Array = weights_BNRTS * (d_out_BNRTS - inner)
    return d_scores


def attention_mix_vjp(
    weights_BNRTS: Array, v_BNSK: Array, d_out_BNRTK: Array
) -> tuple[Array, Array]:
    """Return d_p = d_out v^T [B, N, R, T, S] and d_v = sum over r of p^T d_out [B, N, S, K].

    As out = p v.
    """
    batch, groups, repeats, length, keys = weights_BNRTS.shape
    d_rows = d_out_BNRTK.reshape(batch, groups, repeats * length, -1)
    rows = weights_BNRTS.reshape(batch, groups, repeats * length, keys)
    d_weights: Array = (d_rows @ v_BNSK.swapaxes(-1, -2)).reshape(weights_BNRTS.shape)
    return d_weights, rows.swapaxes(-1, -2) @ d_rows


def silu_vjp(x: Array, d_out: Array) -> Array:
    """Return d_x = d_out (s + x s (1 - s)) with s = sigmoid(x), as out = x s."""
    sigmoid = ops.sigmoid(x)
    d_x: Array = d_out * (sigmoid + x * sigmoid * (1.0 - sigmoid))
    return d_x


def swiglu_vjp(gate: Array, up: Array, d_out: Array) -> tuple[Array, Array]:
    """Return d_gate = d_out up silu'(gate) and d_up = d_out silu(gate), each [B, T, F].

    As out = silu(gate) up.
    """
    return silu_vjp(gate, d_out * up), d_out * ops.silu(gate)


def cross_entropy_vjp(
    logits_BTV: Array, targets_BT: Array, n_valid: int, z_loss: float = 0.0
) -> Array:
    """Return d_logits = (p - onehot(target) + 2 z log Z p) / n [B, T, V]; 0 for IGNORE.

    As L = sum(log Z - l_target + z (log Z)^2) / n and d(log Z)/dl = p, the softmax; z is
    ``z_loss`` and n ``n_valid``.
    """
    log_z = ops.log_sum_exp(logits_BTV)
    d_logits: Array = np.exp(logits_BTV - log_z) * (1.0 + 2.0 * z_loss * log_z)
    valid = targets_BT != IGNORE
    rows, columns = np.nonzero(valid)
    d_logits[rows, columns, targets_BT[valid]] -= 1.0
    d_logits *= valid[..., None]
    d_logits /= n_valid
    return d_logits


# The operations of ``backward``; a namespace with some replaced is a trainer with a bug.
REFERENCE_VJPS = SimpleNamespace(
    embed_vjp=embed_vjp,
    linear_vjp=linear_vjp,
    rms_norm_vjp=rms_norm_vjp,
    apply_rope_vjp=apply_rope_vjp,
    attention_scores_vjp=attention_scores_vjp,
    masked_softmax_vjp=masked_softmax_vjp,
    attention_mix_vjp=attention_mix_vjp,
    swiglu_vjp=swiglu_vjp,
    cross_entropy_vjp=cross_entropy_vjp,
)
Vjps = ModuleType | SimpleNamespace


class Batch(NamedTuple):
    """One micro-batch: input tokens, target tokens, and optionally rotary positions and a mask."""

    tokens: Array  # int [B, T]
    targets: Array  # int [B, T]; IGNORE adds nothing to the loss
    positions: Array | None = None  # int [B, T]; None: 0 to T - 1
    mask: Array | None = None  # bool [B, T, T], True = may attend; None: causal


def loss_and_grads(
    params: Mapping[str, Array],
    batch: Batch,
    config: LlamaConfig,
    *,
    n_valid: int | None = None,
    z_loss: float = 0.0,
    vjps: Vjps = REFERENCE_VJPS,
    ops: Ops = ops,
) -> tuple[float, Grads]:
    """Return ``cross_entropy_sum / n_valid`` of a micro-batch and its gradient by parameter name.

    n_valid  the valid targets of the whole step, so that micro-batches add up to the mean;
             default: those of this batch.
    z_loss   factor of (log Z)^2, which keeps the softmax's normaliser Z near one (Chowdhery et
             al. 2022, section 5).
    ops      the operations of the forward pass.
    vjps     the operations of the backward pass.
    """
    count = int(np.sum(batch.targets != IGNORE)) if n_valid is None else n_valid
    activations: dict[str, Array] = {}
    logits, _ = forward(
        params,
        batch.tokens,
        config,
        positions=batch.positions,
        mask=batch.mask,
        trace=activations.__setitem__,
        ops=ops,
    )
    loss = ops.cross_entropy_sum(logits, batch.targets, z_loss) / count
    d_logits = vjps.cross_entropy_vjp(logits, batch.targets, count, z_loss)
    return float(loss), backward(params, batch, activations, d_logits, config, vjps)


def backward(
    params: Mapping[str, Array],
    batch: Batch,
    activations: Mapping[str, Array],
    d_logits_BTV: Array,
    config: LlamaConfig,
    vjps: Vjps = REFERENCE_VJPS,
) -> Grads:
    """Return every parameter's gradient, of its parameter's shape, from d_logits [B, T, V].

    ``activations`` are those of naming.activation_axes, by name, as ``forward`` traced them.
    """
    length = batch.tokens.shape[1]
    positions = ops.next_positions(length, 0)[None] if batch.positions is None else batch.positions
    mask = ops.causal_mask(length, length)[None] if batch.mask is None else batch.mask
    dtype = activations["embed"].dtype
    tables = ops.rope_tables(positions, config, dtype)
    head = EMBED if config.tie_embeddings else LM_HEAD
    d_x, d_head = vjps.linear_vjp(activations["norm"], params[head], d_logits_BTV)
    grads: Grads = {head: d_head}
    last_residual = activations[f"layers.{config.n_layers - 1}.residual"]
    d_x, grads[NORM] = vjps.rms_norm_vjp(last_residual, params[NORM], config.norm_eps, d_x)
    for i in reversed(range(config.n_layers)):
        of_layer = {name: activations[f"layers.{i}.{name}"] for name in LAYER_AXES}
        of_layer["input"] = activations["embed" if i == 0 else f"layers.{i - 1}.residual"]
        layer = layer_params(params, i, config)
        d_x, d_layer = block_backward(layer, of_layer, d_x, config, tables, mask, vjps)
        grads |= {f"model.layers.{i}.{name}": value for name, value in d_layer.items()}
    d_embed = vjps.embed_vjp(params[EMBED], batch.tokens, d_x)
    # A tied matrix is embedding and head, and its gradient is the sum of both.
    grads[EMBED] = grads[EMBED] + d_embed if config.tie_embeddings else d_embed
    return grads


def block_backward(
    layer: Mapping[str, Array],
    activations: Mapping[str, Array],
    d_out_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    vjps: Vjps,
) -> tuple[Array, Grads]:
    """Return d_x [B, T, D] of one block and its parameters' gradients.

    For out = x + f(x), d_x = d_out + J_f^T d_out. ``activations`` are the block's own, by their
    names below ``layers.{i}.``, and its "input" x.
    """
    grads: Grads = {}
    d_ffn, grads["mlp.down_proj.weight"] = vjps.linear_vjp(
        activations["ffn"], layer["mlp.down_proj.weight"], d_out_BTD
    )
    d_gate, d_up = vjps.swiglu_vjp(activations["gate"], activations["up"], d_ffn)
    d_h, grads["mlp.gate_proj.weight"] = vjps.linear_vjp(
        activations["ffn_norm"], layer["mlp.gate_proj.weight"], d_gate
    )
    d_h_up, grads["mlp.up_proj.weight"] = vjps.linear_vjp(
        activations["ffn_norm"], layer["mlp.up_proj.weight"], d_up
    )
    name = "post_attention_layernorm.weight"
    d_x, grads[name] = vjps.rms_norm_vjp(
        activations["attn_residual"], layer[name], config.norm_eps, d_h + d_h_up
    )
    d_x = d_x + d_out_BTD
    d_h, d_attention = attention_backward(layer, activations, d_x, config, tables, mask_BTS, vjps)
    grads |= d_attention
    name = "input_layernorm.weight"
    d_in, grads[name] = vjps.rms_norm_vjp(activations["input"], layer[name], config.norm_eps, d_h)
    return d_x + d_in, grads


def attention_backward(
    layer: Mapping[str, Array],
    activations: Mapping[str, Array],
    d_out_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    vjps: Vjps,
) -> tuple[Array, Grads]:
    """Return d_h [B, T, D] of self-attention's input h and its parameters' gradients.

    ``activations`` as in ``block_backward``. The attention weights are not among them and are
    computed again from q, k and the mask.
    """
    grads: Grads = {}
    d_merged, grads["self_attn.o_proj.weight"] = vjps.linear_vjp(
        ops.merge_heads(activations["attn"]), layer["self_attn.o_proj.weight"], d_out_BTD
    )
    d_mixed = ops.group_queries(ops.split_heads(d_merged, config.head_dim), config.n_kv_heads)
    q_BNRTK = ops.group_queries(activations["q_rope"], config.n_kv_heads)
    k_BNSK, v_BNSK = activations["k_rope"].swapaxes(1, 2), activations["v"].swapaxes(1, 2)
    weights = ops.masked_softmax(ops.attention_scores(q_BNRTK, k_BNSK), mask_BTS)
    d_weights, d_v = vjps.attention_mix_vjp(weights, v_BNSK, d_mixed)
    d_scores = vjps.masked_softmax_vjp(weights, d_weights)
    d_q, d_k = vjps.attention_scores_vjp(q_BNRTK, k_BNSK, d_scores)
    d_heads = {
        "q": vjps.apply_rope_vjp(*tables, ops.ungroup_queries(d_q)),
        "k": vjps.apply_rope_vjp(*tables, d_k.swapaxes(1, 2)),
        "v": d_v.swapaxes(1, 2),
    }
    d_h = np.zeros_like(d_out_BTD)
    for short, d_head in d_heads.items():
        name = f"self_attn.{short}_proj.weight"
        d_part, grads[name] = vjps.linear_vjp(
            activations["attn_norm"], layer[name], ops.merge_heads(d_head)
        )
        d_h = d_h + d_part
    return d_h, grads
