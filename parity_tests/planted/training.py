"""Backends with planted training bugs: the model of operations under autograd, and AdamW by hand.

Where the bug is in a gradient, the operation's value is right and its gradient is that of another
function (``gradient_of``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import EMBED, LM_HEAD
from reference_np.optim import Hyperparameters

from . import operations as planted
from .operations import Array, Operation, Params
from .port import Planted

Tensors = dict[str, Tensor]


def gradient_of(wrong: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, with the gradient of ``wrong``; both of one shape."""
    return value.detach() + wrong - wrong.detach()


def rms_norm(x: Tensor, w: Tensor, eps: float, bug: str) -> Tensor:
    """Return RMSNorm [..., D] with the gradient of a norm's bug, by its name."""
    right = planted.rms_norm(x, w, eps)
    root = (planted.mean_square(x) + eps).sqrt()
    if bug == "norm_without_mean":
        return gradient_of(x / root.detach() * w, right)
    if bug == "norm_weight_from_input":
        return gradient_of(x / root * w.detach() + x.detach() * w, right)
    return gradient_of(x / root * w.detach() ** 2 + (x / root).detach() * w, right)


def masked_softmax(scores: Tensor, mask: Tensor, diagonal: bool) -> Tensor:
    """Return softmax with the Jacobian's diagonal alone, or without its subtracted sum."""
    right = planted.masked_softmax(scores, mask)
    p = right.detach()
    return gradient_of(p * (1 - p) * scores if diagonal else p * scores, right)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, forward: bool) -> Tensor:
    """Return RoPE whose gradient is rotated forward, or not at all."""
    # A rotation's gradient is the rotation by -angle: of the rotation by -angle, it is forward.
    wrong = planted.apply_rope(x, cos, -sin) if forward else x
    return gradient_of(wrong, planted.apply_rope(x, cos, sin))


def wrong_sharing(n_rep: int, average: bool) -> Callable[[Tensor], Tensor]:
    """Return an identity of repeated heads [B, H, S, K] whose gradients do not add up.

    They are averaged over the ``n_rep`` query heads, or come from the first one alone.
    """

    def share(heads: Tensor) -> Tensor:
        if average:
            return gradient_of(heads / n_rep, heads)
        first = torch.arange(heads.shape[1]) % n_rep == 0
        return gradient_of(heads * first[:, None, None], heads)

    return share


def embed_last(weight: Tensor, tokens: Tensor) -> Tensor:
    """Return embeddings [B, T, D] of which only a token's last occurrence has a gradient."""
    flat = tokens.flatten().tolist()
    last = {token: index for index, token in enumerate(flat)}
    keep = torch.tensor([last[token] == index for index, token in enumerate(flat)])
    right = planted.embed(weight, tokens)
    return gradient_of(right * keep.view(*tokens.shape, 1), right)


class NarrowSum(torch.autograd.Function):
    """An embedding whose gradient is summed in bfloat16, one occurrence after the other."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(weight, tokens)
        return planted.embed(weight, tokens)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor, None]:
        weight, tokens = ctx.saved_tensors
        total = torch.zeros_like(weight, dtype=torch.bfloat16)
        for token, row in zip(tokens.flatten(), d_out[0].flatten(0, 1), strict=True):
            total[token] += row.bfloat16()
        return total.to(weight.dtype), None


def swiglu(gate: Tensor, up: Tensor, bug: str) -> Tensor:
    """Return SwiGLU [B, T, F] with the gradient of one of its bugs, by its name."""
    right = planted.swiglu(gate, up)
    if bug == "up_from_gate":
        return gradient_of(F.silu(gate) * up.detach() + gate.detach() * up, right)
    wrong = gate.sigmoid().detach() * gate * up.detach() + F.silu(gate).detach() * up
    return gradient_of(wrong, right)


def operations(bug: str, n_rep: int) -> dict[str, Operation]:
    """Return the operations that a bug of the model's gradients replaces; none for other bugs."""
    share = wrong_sharing(n_rep, bug == "keys_averaged")
    if bug.startswith("norm_"):
        return {"rms_norm": lambda x, w, eps: rms_norm(x, w, eps, bug)}
    if bug.startswith("softmax_"):
        return {"masked_softmax": lambda s, m: masked_softmax(s, m, bug == "softmax_diagonal")}
    if bug.startswith("rope_"):
        forward = bug == "rope_forward_angle"
        return {"apply_rope": lambda x, cos, sin: apply_rope(x, cos, sin, forward)}
    if bug.startswith("keys_"):
        return {"attention_scores": lambda q, k: planted.attention_scores(q, share(k))}
    table: dict[str, dict[str, Operation]] = {
        "scores_without_scale": {
            "attention_scores": lambda q, k: gradient_of(q @ k.mT, planted.attention_scores(q, k))
        },
        "values_from_first_head": {"attention_mix": lambda w, v: w @ share(v)},
        "embedding_forgotten": {"embed": lambda w, t: planted.embed(w.detach(), t)},
        "embedding_last_wins": {"embed": embed_last},
        "embedding_sum_bf16": {"embed": NarrowSum.apply},
        "silu_without_second_term": {"swiglu": lambda g, u: swiglu(g, u, bug)},
        "up_from_gate": {"swiglu": lambda g, u: swiglu(g, u, bug)},
    }
    return table.get(bug, {})


class PlantedTrainer(Planted):
    """The model without a bug of the forward pass, trained with one training bug or none."""

    def __init__(self, bug: str = "") -> None:
        super().__init__()
        self.bug = bug

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        loss, grads = self._gradients(config, _tensors(params), batches, z_loss)
        return loss, {name: g.numpy() for name, g in grads.items()}

    def train(
        self,
        config: LlamaConfig,
        params: Params,
        batches: Sequence[Batch],
        hyper: Hyperparameters,
        steps: int,
    ) -> Mapping[str, Any]:
        tensors, losses, norms = _tensors(params), [], []
        exp_avg, exp_avg_sq = (
            {name: torch.zeros_like(p) for name, p in tensors.items()} for _ in range(2)
        )
        for t in range(steps):
            loss, grads = self._gradients(config, tensors, batches, hyper.z_loss)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
            new = {}
            for name, g in grads.items():
                p, moments = tensors[name].detach(), (exp_avg[name], exp_avg_sq[name])
                g = self._clipped(g, norm, hyper.grad_clip)
                new[name], *moments = self._adam(p, g, *moments, t, hyper)
                exp_avg[name], exp_avg_sq[name] = moments
            tensors = {name: p.requires_grad_() for name, p in new.items()}
            losses.append(loss)
            norms.append(norm)
        named = {"params": tensors, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        arrays = {
            kind: {name: x.detach().numpy() for name, x in part.items()}
            for kind, part in named.items()
        }
        return {"loss": losses, "grad_norm": norms, **arrays}

    def _gradients(
        self, config: LlamaConfig, tensors: Tensors, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Tensors]:
        replaced = operations(self.bug, config.n_rep)

        def read(params: Tensors, name: str, config: LlamaConfig) -> Tensor:
            return params[EMBED if name == LM_HEAD and config.tie_embeddings else name]

        ops = SimpleNamespace(**{**planted.OPERATIONS, **replaced, "read": read})
        counts = [int((batch.targets != -100).sum()) for batch in batches]
        loss = torch.zeros((), dtype=torch.float64)
        for batch, count in zip(batches, counts, strict=True):
            n = sum(counts)
            if self.bug == "mean_of_means":
                n = count * len(batches)
            ids, targets = (torch.from_numpy(np.array(x)) for x in batch[:2])
            logits, _ = planted.forward(
                config, tensors, ids, None, None, None, lambda name, value: None, ops
            )
            loss = loss + self._loss(logits.flatten(0, 1), targets, n, z_loss)
        loss.backward()
        return loss.item(), {name: t.grad for name, t in tensors.items()}

    def _loss(self, logits: Tensor, targets: Tensor, n: int, z_loss: float) -> Tensor:
        flat, log_z = targets.flatten(), logits.logsumexp(-1)
        nll = F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum")
        squares = (log_z.square() * (flat != -100)).sum()
        right = (nll + z_loss * squares) / n
        if self.bug == "loss_per_row":
            return gradient_of((nll + z_loss * squares) / len(targets), right)
        if self.bug == "padding_learnt":
            with_padding = F.cross_entropy(logits, flat.clamp(min=0), reduction="sum")
            return gradient_of((with_padding + z_loss * log_z.square().sum()) / n, right)
        if self.bug == "z_loss_forgotten":
            return gradient_of(nll / n, right)
        return right

    def _clipped(self, g: Tensor, norm: float, limit: float) -> Tensor:
        if self.bug == "clip_by_value":
            return g.clamp(-limit, limit)
        if self.bug == "clip_each":
            norm = float(g.norm())
        factor = limit / (norm + 1e-6)
        return g * (factor if self.bug == "clip_always" else min(1.0, factor))

    def _adam(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, hyper: Hyperparameters
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a parameter and its moments after step ``t``, from 0; all of one shape."""
        decays = p.ndim > 1 or self.bug == "decay_on_norms"
        decay = hyper.weight_decay if decays else 0.0
        if self.bug == "decay_in_gradient":
            g, decay = g + decay * p, 0.0
        lr = _rate(t, hyper)
        decay_rate = 1.0 if self.bug == "decay_without_rate" else lr
        step = t + (2 if self.bug == "adam_step_from_one_too_many" else 1)
        m = hyper.beta1 * m + (1 - hyper.beta1) * g
        v = hyper.beta2 * v + (1 - hyper.beta2) * g.square()
        m_hat, v_hat = m / (1 - hyper.beta1**step), v / (1 - hyper.beta2**step)
        if self.bug == "adam_uncorrected":
            m_hat, v_hat = m, v
        denominator = v_hat.sqrt() + hyper.adam_eps
        if self.bug == "adam_eps_inside":
            denominator = (v_hat + hyper.adam_eps).sqrt()
        return p - decay_rate * decay * p - lr * m_hat / denominator, m, v


def _rate(t: int, hyper: Hyperparameters) -> float:
    """Return the learning rate of step ``t``, from 0: a linear warmup, then half a cosine."""
    if t < hyper.warmup_steps:
        return hyper.lr * (t + 1) / hyper.warmup_steps
    last = max(1, hyper.steps - 1 - hyper.warmup_steps)
    height = (1 + math.cos(math.pi * min(1.0, (t - hyper.warmup_steps) / last))) / 2
    return hyper.lr * (hyper.final_lr_ratio + (1 - hyper.final_lr_ratio) * height)


def _tensors(params: Params) -> Tensors:
    return {name: torch.from_numpy(np.array(params[name])).requires_grad_() for name in params}
