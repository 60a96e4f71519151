"""One batch of PPO: from drawn answers and their scores to the updated policy (section 3.2.3).

The functions of ``policy``, ``divergence`` and ``masked`` in the order in which a trainer runs
them. Answers are drawn once; all that the updates need of them is computed before the first.

Axes: R answers that were drawn together, B those of one minibatch, T position, V vocabulary,
D dim.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import divergence, masked, optim, policy
from .config import LlamaConfig
from .grad import Batch, Grads, backward
from .model import forward
from .naming import EMBED, LM_HEAD
from .ops import IGNORE, Array
from .optim import Hyperparameters, OptState, Params

VALUE = "value.weight"  # the value head [1, D], beside the model's own parameters


class Settings(NamedTuple):
    """How a policy is updated; the defaults are the paper's where it names them."""

    beta: float = 0.01  # weight of the divergence
    kl: str = "reward"  # where it counts: "reward", k1 of each token; "loss", k2 of each
    temperature: float = 1.0  # that the answers were drawn with
    clip: float = 0.2
    mean: str = "token"  # of the losses: see policy.loss_weights
    group: int = 0  # answers to a prompt, which follow each other; 0: advantages of a value head
    gamma: float = 1.0
    lam: float = 0.95  # the paper does not say; this is Schulman et al. 2017's
    value_weight: float = 0.1  # the paper does not say
    whitens: bool = True  # whether advantages of a value head are whitened: the paper does not say


class Drawn(NamedTuple):
    """R drawn answers with their prompts."""

    tokens: Array  # int [R, T]
    targets: Array  # int [R, T]: the next token where the policy drew it, else IGNORE
    scores: Array  # [R], the combined linear score, before whitening
    log_reference: Array  # [R, T], of the frozen model, at the same temperature


class Learnt(NamedTuple):
    """What the updates learn from [R, T]: fixed before the first of them."""

    log_old: Array
    advantages: Array
    returns: Array  # 0 without a value head


class Update(NamedTuple):
    """What one minibatch's update measured."""

    loss: float
    value_loss: float
    grad_norm: float
    entropy: float  # mean over drawn tokens
    clipped: float  # share of drawn tokens whose ratio is beyond the clip and has no gradient


def outputs(
    params: Mapping[str, Array], tokens_BT: Array, config: LlamaConfig
) -> tuple[Array, Array, dict[str, Array]]:
    """Return logits [B, T, V], values [B, T], and the activations by name.

    The value of a position is that before its next token is drawn. Without a value head it is 0.
    """
    activations: dict[str, Array] = {}
    logits, _ = forward(params, tokens_BT, config, trace=activations.__setitem__)
    values = np.zeros(tokens_BT.shape, logits.dtype)
    if VALUE in params:
        values = activations["norm"] @ params[VALUE][0]
    return logits, values, activations


def learn_from(
    params: Mapping[str, Array], drawn: Drawn, config: LlamaConfig, settings: Settings
) -> Learnt:
    """Return old log-probabilities, advantages and returns [R, T] of answers just drawn.

    Scores are whitened over all R, and so are advantages over all their tokens.
    """
    mask = drawn.targets != IGNORE
    logits, values, _ = outputs(params, drawn.tokens, config)
    log_old = divergence.log_probs(logits, drawn.targets, settings.temperature)
    scores = masked.whiten(drawn.scores, np.ones(drawn.scores.shape, bool))
    beta = settings.beta if settings.kl == "reward" else 0.0
    rewards = policy.kl_rewards(scores, log_old, drawn.log_reference, mask, beta)
    if settings.group:
        rewards_BG = rewards.sum(axis=1).reshape(-1, settings.group)
        each = policy.group_advantage(rewards_BG, np.ones(rewards_BG.shape, bool))
        return Learnt(log_old, each.reshape(-1, 1) * mask, np.zeros_like(log_old))
    advantages, returns = policy.gae(rewards, values, mask, settings.gamma, settings.lam)
    if settings.whitens:
        advantages = masked.whiten(advantages, mask)
    return Learnt(log_old, advantages, returns)


def losses_and_grads(
    params: Mapping[str, Array],
    drawn: Drawn,
    learnt: Learnt,
    config: LlamaConfig,
    settings: Settings,
) -> tuple[Update, Grads]:
    """Return what a minibatch's update measures, and the gradient of its loss.

    ``policy_loss + value_weight value_loss``, and with kl "loss" beta times the mean of k2.
    """
    targets, mask = drawn.targets, drawn.targets != IGNORE
    mean, temperature = settings.mean, settings.temperature
    count = policy.loss_count(mask, mean)
    logits, values, activations = outputs(params, drawn.tokens, config)
    log_p = divergence.log_probs(logits, targets, temperature)
    given = log_p, learnt.log_old, learnt.advantages, mask, count
    loss = policy.policy_loss(*given, clip=settings.clip, mean=mean)
    d_log_p = policy.policy_loss_vjp(*given, clip=settings.clip, mean=mean)
    if settings.kl == "loss":
        weights = settings.beta * policy.loss_weights(mask, count, mean)
        loss += float(np.sum(weights * divergence.k2(log_p, drawn.log_reference, mask)))
        d_log_p = d_log_p + divergence.k2_vjp(log_p, drawn.log_reference, mask, weights)
    d_logits = divergence.log_probs_vjp(logits, targets, d_log_p, temperature)
    value_loss, d_values = 0.0, np.zeros_like(values)
    if VALUE in params:
        about = values, learnt.returns, mask, count
        value_loss = policy.value_loss(*about, mean=mean)
        d_values = settings.value_weight * policy.value_loss_vjp(*about, mean=mean)
        loss += settings.value_weight * value_loss
    grads = gradients(params, drawn.tokens, activations, d_logits, d_values, config)
    entropy = float(divergence.entropy(logits / temperature, mask).sum()) / mask.sum()
    ratio = np.exp(divergence.k1(log_p, learnt.log_old, mask))
    beyond = np.where(learnt.advantages > 0, ratio > 1 + settings.clip, ratio < 1 - settings.clip)
    clipped = float((beyond & mask & (learnt.advantages != 0)).sum()) / mask.sum()
    norm = optim.global_norm(grads)
    return Update(loss, value_loss, norm, entropy, clipped), grads


def gradients(
    params: Mapping[str, Array],
    tokens_BT: Array,
    activations: Mapping[str, Array],
    d_logits_BTV: Array,
    d_values_BT: Array,
    config: LlamaConfig,
) -> Grads:
    """Return every parameter's gradient, the value head's too.

    A value head is one row more of the vocabulary's: the two matrices are run as one.
    """
    if VALUE not in params:
        return backward(params, Batch(tokens_BT, tokens_BT), activations, d_logits_BTV, config)
    head = EMBED if config.tie_embeddings else LM_HEAD
    joined = {**params, LM_HEAD: np.concatenate([params[head], params[VALUE]])}
    d_both = np.concatenate([d_logits_BTV, d_values_BT[..., None]], axis=-1)
    untied = dataclasses.replace(config, tie_embeddings=False)
    grads = backward(joined, Batch(tokens_BT, tokens_BT), activations, d_both, untied)
    d_head = grads.pop(LM_HEAD)
    grads[head] = d_head[:-1] + grads[head] if config.tie_embeddings else d_head[:-1]
    return {**grads, VALUE: d_head[-1:]}


def ppo_batch(
    params: Params,
    state: OptState,
    drawn: Drawn,
    minibatches: Sequence[Sequence[int]],
    config: LlamaConfig,
    hyper: Hyperparameters,
    settings: Settings,
) -> tuple[Params, OptState, list[Update]]:
    """Return policy and AdamW's state after an update for each minibatch, and their measures.

    minibatches  the answers of each, by their numbers among the R; of a group, all or none.

    One update takes one minibatch; its losses are means over it. Advantages, returns and old
    log-probabilities are those of the policy that drew, for all updates. The learning rate is
    constant, ``hyper.lr``.
    """
    learnt = learn_from(params, drawn, config, settings)
    updates = []
    for rows in minibatches:
        own = Drawn(*(x[list(rows)] for x in drawn))
        fixed = Learnt(*(x[list(rows)] for x in learnt))
        update, grads = losses_and_grads(params, own, fixed, config, settings)
        clipped, _ = optim.clip(grads, hyper.grad_clip)
        step, moved = state.step + 1, {}
        for name, p in params.items():
            decay = hyper.weight_decay if optim.decays(p) else 0.0
            moments = state.exp_avg[name], state.exp_avg_sq[name]
            moved[name] = optim.adamw(p, clipped[name], *moments, step, hyper.lr, decay, hyper)
        params, first, second = ({n: parts[i] for n, parts in moved.items()} for i in range(3))
        state = OptState(step, first, second)
        updates.append(update)
    return params, state, updates
