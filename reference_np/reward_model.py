"""The reward model's training step: a Llama with a scalar head, on pairs of answers.

"The classification head for next-token prediction is replaced with a regression head for outputting
a scalar reward" (Llama 2, section 3.2.2): a head over a vocabulary of one word, whose logit is the
reward, and which is never tied to the embedding.

Axes: B row (an answer with its conversation; the two of a pair follow each other, the chosen one
first), P pair, T query position, S key position, D dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import grad, ops, reward
from .config import InputError, LlamaConfig
from .grad import Batch, Grads
from .model import forward
from .naming import LM_HEAD, SCORE
from .ops import IGNORE, Array

# The operations of ``loss_and_grads`` after the model; with some replaced, a trainer with a bug.
REFERENCE_LOSSES = SimpleNamespace(
    score_at=reward.score_at,
    score_at_vjp=reward.score_at_vjp,
    pair_loss=reward.pair_loss,
    pair_loss_vjp=reward.pair_loss_vjp,
    safety_loss=reward.safety_loss,
    safety_loss_vjp=reward.safety_loss_vjp,
)


class PairBatch(NamedTuple):
    """One micro-batch of pairs of conversations, padded in any way."""

    tokens: Array  # int [B, T]
    mask: Array  # bool [B, T]; True = a token of the conversation
    margins: Array  # [P]
    labels: Array  # int [B]: 1 for a safe answer, 0 for an unsafe one, IGNORE for neither


class RewardStep(NamedTuple):
    """The loss of a training step, the scores [B] of each micro-batch, and the gradients."""

    loss: float
    scores: list[Array]
    grads: Grads  # by parameter name, the scalar head's too


def loss_and_grads(
    params: Mapping[str, Array],
    batches: Sequence[PairBatch],
    config: LlamaConfig,
    safety_weight: float = 0.0,
    vjps: grad.Vjps = grad.REFERENCE_VJPS,
    losses: SimpleNamespace = REFERENCE_LOSSES,
) -> RewardStep:
    """Return ``pair_loss + safety_weight safety_loss`` of a step, its scores and its gradients.

    The first is a mean over all pairs of the step, the second over all labelled answers of it.

    params  by Hugging Face name, the scalar head [1, D] as score.weight.
    config  of the trunk; that its embedding is tied to a head says nothing of the scalar one.
    vjps    the operations of the model's backward pass.
    losses  the operations after the model.

    Raises InputError for a step without a pair, and for a row without a token.
    """
    n_pairs = sum(len(batch.margins) for batch in batches)
    if not n_pairs:
        raise InputError("a training step without a single pair has no loss")
    n_labelled = int(sum(np.sum(batch.labels != IGNORE) for batch in batches))
    model = replace(config, tie_embeddings=False)
    named = {**params, LM_HEAD: params[SCORE]}
    loss, scores, total = 0.0, list[Array](), Grads()
    for batch in batches:
        inputs = _inputs(batch)
        activations: dict[str, Array] = {}
        values, _ = forward(
            named,
            inputs.tokens,
            model,
            positions=inputs.positions,
            mask=inputs.mask,
            trace=activations.__setitem__,
        )
        scores_B = losses.score_at(values[:, :, 0], batch.mask)
        part, d_scores_B = _loss_of_scores(
            scores_B, batch, n_pairs, n_labelled, safety_weight, losses
        )
        d_values = losses.score_at_vjp(batch.mask, d_scores_B)[:, :, None]
        grads = grad.backward(named, inputs, activations, d_values, model, vjps)
        grads[SCORE] = grads.pop(LM_HEAD)
        loss += part
        scores.append(scores_B)
        total = {name: total[name] + g if total else g for name, g in grads.items()}
    return RewardStep(loss, scores, total)


def _inputs(batch: PairBatch) -> Batch:
    """Return the model's inputs: positions count a row's own tokens, and padding is not seen.

    Padding sees itself, so that no row of the softmax is empty.
    """
    length = batch.tokens.shape[1]
    positions = np.maximum(np.cumsum(batch.mask, axis=1) - 1, 0)
    sees = ops.causal_mask(length, length)[None] & batch.mask[:, None, :]
    return Batch(batch.tokens, batch.tokens, positions, sees | np.eye(length, dtype=bool))


def _loss_of_scores(
    scores_B: Array,
    batch: PairBatch,
    n_pairs: int,
    n_labelled: int,
    safety_weight: float,
    losses: Any,
) -> tuple[float, Array]:
    """Return a micro-batch's part of the step's loss, and its derivative [B] by the scores."""
    margins_P = batch.margins.astype(scores_B.dtype)
    given = scores_B[::2], scores_B[1::2], margins_P, n_pairs
    loss = losses.pair_loss(*given)
    d_scores_B = np.stack(losses.pair_loss_vjp(*given), axis=1).reshape(-1)
    if safety_weight and n_labelled:
        labelled = scores_B, batch.labels, n_labelled
        loss += safety_weight * losses.safety_loss(*labelled)
        d_scores_B = d_scores_B + safety_weight * losses.safety_loss_vjp(*labelled)
    return loss, d_scores_B.astype(scores_B.dtype)
