"""Gradients by hand: a vector-Jacobian product for every operation and for the whole model.

Each ``*_vjp`` takes what its operation took (or computed) and the loss's gradient with respect
to the operation's output, written ``d_out``, and returns the gradients with respect to its
inputs. For y = f(x), d_x = J^T d_y. Dtypes follow the inputs, as in ops.

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
    """Return d_W [V, D]: row v is the sum of d_y over every place where v stands, as y = W[t]."""
    d_weight = np.zeros_like(weight_VD)
    np.add.at(d_weight, tokens_BT, d_out_BTD)  # adds repeated tokens; d_weight[t] += would not
    return d_weight


def linear_vjp(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
    """Return d_x = d_y W and d_W = d_y^T x, summed over every position, as y = x W^T."""
    flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_x: Array = (flat_d @ weight).reshape(x.shape)
    return d_x, flat_d.T @ flat_x


def rms_norm_vjp(x: Array, weight_D: Array, eps: float, d_out: Array) -> tuple[Array, Array]:
    """Return d_x [..., D] and d_w [D] of y = w n with n = x / r and r = sqrt(mean(x^2) + eps).

    dr/dx = x / (D r), so with g = w d_y: d_x = (g - n mean(g n)) / r, and d_w = sum(d_y n).
    """
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    n = x / r
    g = d_out * weight_D
    d_x: Array = (g - n * np.mean(g * n, axis=-1, keepdims=True)) / r
    d_weight: Array = (d_out * n).reshape(-1, x.shape[-1]).sum(axis=0)
    return d_x, d_weight


def apply_rope_vjp(cos: Array, sin: Array, d_out_BTHK: Array) -> Array:
    """Return d_x [B, T, H, K]: d_y rotated back, as a rotation's transpose is its inverse."""
    return ops.apply_rope(d_out_BTHK, cos, -sin)


def attention_scores_vjp(q_BNRTK: Array, k_BNSK: Array, d_out_BNRTS: Array) -> tuple[Array, Array]:
    """Return d_q = d_s k / sqrt(K) and d_k = sum over r of d_s^T q / sqrt(K).

    As s = q k^T / sqrt(K), q [B, N, R, T, K] and k [B, N, S, K]. The sum over the R query heads
    that read one key head is the gradient of sharing it.
    """
    batch, groups, repeats, length, width = q_BNRTK.shape
    d_rows = d_out_BNRTS.reshape(batch, groups, repeats * length, -1) * (1.0 / math.sqrt(width))
    rows = q_BNRTK.reshape(batch, groups, repeats * length, width)
    d_q: Array = (d_rows @ k_BNSK).reshape(q_BNRTK.shape)
    d_k: Array = d_rows.swapaxes(-1, -2) @ rows
    return d_q, d_k


def masked_softmax_vjp(weights_BNRTS: Array, d_out_BNRTS: Array) -> Array:
    """Return d_s = p (d_p - sum(d_p p)) [B, N, R, T, S] from the weights p, not the scores.

    As dp_i/ds_j = p_i (delta_ij - p_j). Where the mask forbids, p is 0 and so is d_s; an all-masked
    row passes nothing back.
    """
    inner = np.sum(d_out_BNRTS * weights_BNRTS, axis=-1, keepdims=True)
    d_scores: Array = weights_BNRTS * (d_out_BNRTS - inner)
    return d_scores


def attention_mix_vjp(
    weights_BNRTS: Array, v_BNSK: Array, d_out_BNRTK: Array
) -> tuple[Array, Array]:
    """Return d_p = d_y v^T and d_v = sum over r of p^T d_y, as y = p v."""
    batch, groups, repeats, length, keys = weights_BNRTS.shape
    d_rows = d_out_BNRTK.reshape(batch, groups, repeats * length, -1)
    rows = weights_BNRTS.reshape(batch, groups, repeats * length, keys)
    d_weights: Array = (d_rows @ v_BNSK.swapaxes(-1, -2)).reshape(weights_BNRTS.shape)
    return d_weights, rows.swapaxes(-1, -2) @ d_rows


def silu_vjp(x: Array, d_out: Array) -> Array:
    """Return d_x = d_y (s + x s (1 - s)) with s = sigmoid(x), as y = x s."""
    sigmoid = ops.sigmoid(x)
    d_x: Array = d_out * (sigmoid + x * sigmoid * (1.0 - sigmoid))
    return d_x


def swiglu_vjp(gate: Array, up: Array, d_out: Array) -> tuple[Array, Array]:
    """Return d_g = d_y u silu'(g) and d_u = d_y silu(g), each [B, T, F], as y = silu(g) u."""
    return silu_vjp(gate, d_out * up), d_out * ops.silu(gate)


def cross_entropy_vjp(
    logits_BTV: Array, targets_BT: Array, n_valid: int, z_loss: float = 0.0
) -> Array:
    """Return d_l = (p - 1_t + 2 z log Z p) / n, as L = sum(log Z - l_t + z (log Z)^2) / n.

    [B, T, V], because d(log Z)/dl = p, the softmax. Zero where the target is IGNORE.
    """
    log_z = ops.log_sum_exp(logits_BTV)
    d_logits: Array = np.exp(logits_BTV - log_z) * (1.0 + 2.0 * z_loss * log_z)
    valid = targets_BT != IGNORE
    rows, columns = np.nonzero(valid)
    d_logits[rows, columns, targets_BT[valid]] -= 1.0
    d_logits *= valid[..., None]
    d_logits /= n_valid
    return d_logits


# What the whole model calls; a namespace with some replaced is a trainer with a bug.
REFERENCE = SimpleNamespace(
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
    """One micro-batch: what is read, what should follow, and optionally where and what is seen."""

    tokens: Array  # int [B, T]
    targets: Array  # int [B, T], IGNORE where nothing is to be learnt
    positions: Array | None = None  # int [B, T]
    mask: Array | None = None  # bool [B, T, T]


def loss_and_grads(
    params: Mapping[str, Array],
    batch: Batch,
    config: LlamaConfig,
    *,
    n_valid: int | None = None,
    z_loss: float = 0.0,
    vjps: Vjps = REFERENCE,
    ops: Ops = ops,
) -> tuple[float, Grads]:
    """Return the batch's share of the loss and its gradient for every parameter.

    The loss is the sum over valid targets divided by ``n_valid``: the count of the whole
    step, so that micro-batches add up; default: this batch's own count. It includes
    ``z_loss * (log Z)^2`` (PaLM, section 5), which keeps the softmax's normaliser near one.
    ``ops`` computes the forward pass, ``vjps`` the backward pass.
    """
    count = int(np.sum(batch.targets != IGNORE)) if n_valid is None else n_valid
    trace: dict[str, Array] = {}
    logits, _ = forward(
        params,
        batch.tokens,
        config,
        positions=batch.positions,
        mask=batch.mask,
        trace=trace.__setitem__,
        ops=ops,
    )
    loss = ops.cross_entropy_sum(logits, batch.targets, z_loss) / count
    d_logits = vjps.cross_entropy_vjp(logits, batch.targets, count, z_loss)
    return float(loss), backward(params, batch, trace, d_logits, config, vjps)


def backward(
    params: Mapping[str, Array],
    batch: Batch,
    trace: Mapping[str, Array],
    d_logits_BTV: Array,
    config: LlamaConfig,
    vjps: Vjps = REFERENCE,
) -> Grads:
    """Return every parameter's gradient from d_logits [B, T, V], in its parameter's shape.

    ``trace`` has the activations that forward traced, by their names.
    """
    length = batch.tokens.shape[1]
    positions = ops.next_positions(length, 0)[None] if batch.positions is None else batch.positions
    mask = ops.causal_mask(length, length)[None] if batch.mask is None else batch.mask
    dtype = trace["embed"].dtype
    tables = ops.rope_tables(positions, config, dtype)
    head = EMBED if config.tie_embeddings else LM_HEAD
    d_x, d_head = vjps.linear_vjp(trace["norm"], params[head], d_logits_BTV)
    grads: Grads = {head: d_head}
    last = trace[f"layers.{config.n_layers - 1}.residual"]
    d_x, grads[NORM] = vjps.rms_norm_vjp(last, params[NORM], config.norm_eps, d_x)
    for i in reversed(range(config.n_layers)):
        here = {name: trace[f"layers.{i}.{name}"] for name in LAYER_AXES}
        here["input"] = trace["embed"] if i == 0 else trace[f"layers.{i - 1}.residual"]
        layer = layer_params(params, i, config)
        d_x, d_layer = block_backward(layer, here, d_x, config, tables, mask, vjps)
        grads |= {f"model.layers.{i}.{name}": value for name, value in d_layer.items()}
    d_embed = vjps.embed_vjp(params[EMBED], batch.tokens, d_x)
    # A tied embedding is used twice, and its gradient is the sum of both uses.
    grads[EMBED] = grads[EMBED] + d_embed if config.tie_embeddings else d_embed
    return grads


def block_backward(
    layer: Mapping[str, Array],
    here: Mapping[str, Array],
    d_out_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    vjps: Vjps,
) -> tuple[Array, Grads]:
    """Return d_x [B, T, D] of one block and its parameters' gradients.

    For y = x + f(x), d_x = d_y + J_f^T d_y. ``here`` has the block's activations.
    """
    grads: Grads = {}
    d_ffn, grads["mlp.down_proj.weight"] = vjps.linear_vjp(
        here["ffn"], layer["mlp.down_proj.weight"], d_out_BTD
    )
    d_gate, d_up = vjps.swiglu_vjp(here["gate"], here["up"], d_ffn)
    d_h, grads["mlp.gate_proj.weight"] = vjps.linear_vjp(
        here["ffn_norm"], layer["mlp.gate_proj.weight"], d_gate
    )
    d_h_up, grads["mlp.up_proj.weight"] = vjps.linear_vjp(
        here["ffn_norm"], layer["mlp.up_proj.weight"], d_up
    )
    name = "post_attention_layernorm.weight"
    d_x, grads[name] = vjps.rms_norm_vjp(
        here["attn_residual"], layer[name], config.norm_eps, d_h + d_h_up
    )
    d_x = d_x + d_out_BTD
    d_h, d_attention = attention_backward(layer, here, d_x, config, tables, mask_BTS, vjps)
    grads |= d_attention
    name = "input_layernorm.weight"
    d_in, grads[name] = vjps.rms_norm_vjp(here["input"], layer[name], config.norm_eps, d_h)
    return d_x + d_in, grads


def attention_backward(
    layer: Mapping[str, Array],
    here: Mapping[str, Array],
    d_out_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    vjps: Vjps,
) -> tuple[Array, Grads]:
    """Return d_h [B, T, D] of self-attention and its parameters' gradients.

    The attention weights are computed again from q, k and the mask.
    """
    grads: Grads = {}
    d_merged, grads["self_attn.o_proj.weight"] = vjps.linear_vjp(
        ops.merge_heads(here["attn"]), layer["self_attn.o_proj.weight"], d_out_BTD
    )
    d_mixed = ops.group_queries(ops.split_heads(d_merged, config.head_dim), config.n_kv_heads)
    q_BNRTK = ops.group_queries(here["q_rope"], config.n_kv_heads)
    k_BNSK, v_BNSK = here["k_rope"].swapaxes(1, 2), here["v"].swapaxes(1, 2)
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
            here["attn_norm"], layer[name], ops.merge_heads(d_head)
        )
        d_h = d_h + d_part
    return d_h, grads
