"""PPO as the paper fine-tunes with it: rewards by token, advantages, losses (section 3.2.3).

A mask is True for the tokens that the policy drew, the end token included; it may have holes, as
where a tool's answer stands among them. What stands elsewhere changes nothing. Losses are sums
divided by a count of the whole step (``loss_count``), so that its parts add up.

Axes: B batch (one answer each), T position, G answers to one prompt.
"""

import numpy as np

from .config import InputError
from .divergence import k1
from .masked import last_real, moments, select, variance
from .ops import Array
from .sft import require_count


def kl_rewards(
    scores_B: Array, log_p_BT: Array, log_ref_BT: Array, mask_BT: Array, beta: float
) -> Array:
    """Return the reward of every token [B, T], whose sum over a row is eq. 4's R (section 3.2.3).

    ``R = score - beta KL(pi || pi_0)``: each token has -beta k1, and the last real one, the end
    token, the score besides. Other practice puts the score one slot later, where nothing was
    drawn and a mask removes it. A row without a real token has no reward.
    """
    rewards = -beta * k1(log_p_BT, log_ref_BT, mask_BT)
    rows, last = last_real(mask_BT)
    rewards[rows, last] += scores_B[rows]
    return rewards


def gae(
    rewards_BT: Array, values_BT: Array, mask_BT: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Return advantages and returns [B, T] (Schulman et al. 2016, eq. 16); 0 where masked.

    ``A_t = delta_t + gamma lam A_t'`` and ``delta_t = r_t + gamma V_t' - V_t``, t' being the next
    real token: slots between are no steps. After the last one both are 0, as the answer has ended.
    A return is A_t + V_t.
    """
    advantages = np.zeros_like(values_BT)
    next_advantage, next_value = np.zeros_like(values_BT[:, 0]), np.zeros_like(values_BT[:, 0])
    for t in reversed(range(mask_BT.shape[1])):
        real = mask_BT[:, t]
        reward, value = select(rewards_BT[:, t], real), select(values_BT[:, t], real)
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        advantages[:, t] = select(advantage, real)
        next_advantage = np.where(real, advantage, next_advantage)
        next_value = np.where(real, value, next_value)
    return advantages, advantages + select(values_BT, mask_BT)


def group_advantage(
    rewards_BG: Array,
    mask_BG: Array,
    *,
    leave_one_out: bool = False,
    unbiased: bool = False,
    divide: bool = True,
) -> Array:
    """Return the advantage of each of a prompt's G answers [B, G] (Shao et al. 2024, section 4.1).

    ``(r - mean) / std`` of the group, whose equal rewards all become exactly 0. Not of the paper,
    which trains a value function; for those who do not.

    mask_BG        False for an answer that counts for nothing: it has 0 and shifts no mean.
    leave_one_out  mean and std of the group's other answers (Ahmadian et al. 2024); one that has
                   no others has 0.
    unbiased       std divides by n - 1, as TRL's does; the default is n.
    divide         False leaves the division out (Liu et al. 2025).

    Mean and std are of float64 and of deviations, whatever the rewards' dtype. Where std is 0, or
    unbiased and of one answer, the difference stays as it is: no epsilon makes it a large number.
    """
    advantages = np.zeros_like(rewards_BG)
    for row, column in zip(*np.nonzero(mask_BG), strict=True):
        members = mask_BG[row].copy()
        members[column] = not leave_one_out
        of = moments(rewards_BG[row], members)
        deviation = variance(of, unbiased and of.n > 1) ** 0.5 if divide else 0.0
        if of.n:
            advantages[row, column] = (float(rewards_BG[row, column]) - of.mean) / (
                deviation or 1.0
            )
    return advantages


def loss_count(mask_BT: Array, mean: str = "token") -> int:
    """Return what a loss's sum is divided by: real tokens, or rows that have one ("sequence").

    Add up those of all micro-batches and processes of a step.
    """
    if mean not in ("token", "sequence"):
        raise InputError(f"mean: {mean!r}; choose 'token' or 'sequence'")
    return int(np.sum(mask_BT if mean == "token" else mask_BT.any(axis=1)))


def loss_weights(mask_BT: Array, count: int, mean: str = "token") -> Array:
    """Return each token's weight in a loss [B, T], float64, 0 where masked.

    "token": 1 / count. "sequence": 1 / (the row's real tokens) / count, so that long answers do
    not outweigh short ones. The paper says neither; "token" is PPO's mean over time steps
    (Schulman et al. 2017, eq. 7).
    """
    loss_count(mask_BT, mean)  # of a known name
    require_count(count)
    lengths = np.maximum(mask_BT.sum(axis=1, keepdims=True), 1)
    return mask_BT / (count if mean == "token" else count * lengths)


def policy_loss(
    log_p_BT: Array,
    log_old_BT: Array,
    advantages_BT: Array,
    mask_BT: Array,
    count: int,
    *,
    clip: float = 0.2,
    mean: str = "token",
) -> float:
    """Return ``-sum w min(ratio A, clip(ratio, 1 - c, 1 + c) A)`` (Schulman et al. 2017, eq. 7).

    ratio = pi / pi_old of each drawn token: 1 before the first update. The weights w are
    ``loss_weights``; c = 0.2 is the paper's (section 3.2.3, "PPO").
    """
    plain, clipped = _objectives(log_p_BT, log_old_BT, advantages_BT, mask_BT, clip)
    weights = loss_weights(mask_BT, count, mean)
    return -float(np.sum(weights * np.minimum(plain, clipped)))


def policy_loss_vjp(
    log_p_BT: Array,
    log_old_BT: Array,
    advantages_BT: Array,
    mask_BT: Array,
    count: int,
    *,
    clip: float = 0.2,
    mean: str = "token",
) -> Array:
    """Return d_log_p = -w ratio A [B, T], and 0 where the clipped objective is the smaller.

    As d(ratio)/d(log pi) = ratio, and the clipped ratio is a constant where it differs.
    """
    plain, clipped = _objectives(log_p_BT, log_old_BT, advantages_BT, mask_BT, clip)
    weights = loss_weights(mask_BT, count, mean).astype(log_p_BT.dtype)
    return -weights * select(plain, plain <= clipped)


def value_loss(
    values_BT: Array,
    returns_BT: Array,
    mask_BT: Array,
    count: int,
    *,
    old_values_BT: Array | None = None,
    clip: float | None = None,
    mean: str = "token",
) -> float:
    """Return ``sum w (V - R)^2 / 2`` over the real tokens (Schulman et al. 2017, section 5).

    Half of their (V - V_targ)^2, as most code has it. With ``clip`` and ``old_values_BT`` it is
    the larger of that and the same of V_old + clip(V - V_old, -c, c), as OpenAI's Baselines have
    it; the paper names no clipping of values, so that the default is none.
    """
    plain, clipped, _ = _squares(values_BT, returns_BT, mask_BT, old_values_BT, clip)
    return float(np.sum(loss_weights(mask_BT, count, mean) * np.maximum(plain, clipped)))


def value_loss_vjp(
    values_BT: Array,
    returns_BT: Array,
    mask_BT: Array,
    count: int,
    *,
    old_values_BT: Array | None = None,
    clip: float | None = None,
    mean: str = "token",
) -> Array:
    """Return d_values = w (V - R) [B, T]; with ``clip`` 0 where the clipped square is the larger.

    There V is beyond the clip, so that its clipped value is a constant.
    """
    plain, clipped, errors = _squares(values_BT, returns_BT, mask_BT, old_values_BT, clip)
    weights = loss_weights(mask_BT, count, mean).astype(values_BT.dtype)
    return weights * select(errors, plain >= clipped)


def _objectives(
    log_p_BT: Array, log_old_BT: Array, advantages_BT: Array, mask_BT: Array, clip: float
) -> tuple[Array, Array]:
    """Return ratio A and the clipped ratio times A [B, T]; 0 where masked."""
    ratio = np.exp(k1(log_p_BT, log_old_BT, mask_BT))
    advantages = select(advantages_BT, mask_BT)
    return ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages


def _squares(
    values_BT: Array,
    returns_BT: Array,
    mask_BT: Array,
    old_values_BT: Array | None,
    clip: float | None,
) -> tuple[Array, Array, Array]:
    """Return (V - R)^2 / 2, that of the clipped V (of V itself without a clip), and V - R."""
    if (clip is None) != (old_values_BT is None):
        raise InputError("clip and old_values_BT: give both, or neither")
    values, returns = select(values_BT, mask_BT), select(returns_BT, mask_BT)
    errors = values - returns
    if clip is None or old_values_BT is None:
        return errors**2 / 2, errors**2 / 2, errors
    old = select(old_values_BT, mask_BT)
    # Not old + clip(values - old): that sum may round away from a V that is within the clip, and
    # the larger square would then be of a constant, without a gradient.
    clipped = np.clip(values, old - clip, old + clip)
    return errors**2 / 2, (clipped - returns) ** 2 / 2, errors
