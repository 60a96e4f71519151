"""Known bugs of fine-tuning code, each as one replaced operation of its modules.

A mutant is a bug of a published trainer (its citation names the reports) or a common slip.
``pytest parity_tests/ --mutants`` runs the tests that tell each from the oracle.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import divergence, masked, ops, policy, reward, sft
from .grad import Batch
from .masked import Moments, last_real, moments, select
from .mutants import COMMON_SLIP, DERIVATION_SLIP, Mutant
from .ops import IGNORE, Array

Segments = Sequence[tuple[Sequence[int], bool]]

# What is learnt.


def _all_learnt(segments: Segments) -> tuple[Array, Array]:
    return sft.sft_labels([(ids, True) for ids, _ in segments])


def _end_ids_ignored(segments: Segments) -> tuple[Array, Array]:
    tokens, targets = sft.sft_labels(segments)
    return tokens, np.where(targets == tokens[-1], IGNORE, targets)


def _end_outside(segments: Segments) -> tuple[Array, Array]:
    parts = [((ids[:-1], learnt), (ids[-1:], False)) for ids, learnt in segments]
    return sft.sft_labels([part for pair in parts for part in pair])


def _border_early(segments: Segments) -> tuple[Array, Array]:
    follows = [*(learnt for _, learnt in segments[1:]), False]
    parts = [
        ((ids[:-1], learnt), (ids[-1:], learnt or after))
        for (ids, learnt), after in zip(segments, follows, strict=True)
    ]
    return sft.sft_labels([part for pair in parts for part in pair])


def _not_shifted(segments: Segments) -> tuple[Array, Array]:
    tokens, _ = sft.sft_labels(segments)
    is_learnt = np.array([learnt for ids, learnt in segments for _ in ids])
    return tokens, np.where(is_learnt, tokens, IGNORE)


def _gatt_all_answers(instruction: Any, turns: Any) -> Any:
    found = sft.gatt_dialogue(instruction, turns)
    return [(message, i % 2 == 1) for i, (message, _) in enumerate(found)]


def _gatt_every_turn(instruction: Any, turns: Any) -> Any:
    found = sft.gatt_dialogue(instruction, turns)
    again = [i % 2 == 0 and i > 0 for i in range(len(found))]
    return [
        (instruction + message if repeated else message, learnt)
        for repeated, (message, learnt) in zip(again, found, strict=True)
    ]


def _see_each_other(conversations: Sequence[tuple[Array, Array]]) -> Batch:
    batch = sft.pack(conversations)
    length = batch.tokens.shape[1]
    return batch._replace(
        positions=np.arange(length)[None], mask=ops.causal_mask(length, length)[None]
    )


def _border_learnt(conversations: Sequence[tuple[Array, Array]]) -> Batch:
    batch = sft.pack(conversations)
    ends = np.cumsum([len(tokens) for tokens, _ in conversations])[:-1]
    targets = batch.targets.copy()
    targets[0, ends - 1] = batch.tokens[0, ends]
    return batch._replace(targets=targets)


# The loss of tokens.


def _learnt(targets: Array) -> int:
    return int(np.sum(targets != IGNORE))


def _mean_of_own(logits: Array, targets: Array, count: int) -> float:
    return sft.token_loss(logits, targets, max(_learnt(targets), 1))


def _nothing_to_learn_is_nan(logits: Array, targets: Array, count: int) -> float:
    return sft.token_loss(logits, targets, count) if _learnt(targets) else float("nan")


def _loss_times_mask(logits: Array, targets: Array, count: int) -> float:
    learnt = targets != IGNORE
    every = divergence.log_probs(logits, np.where(learnt, targets, 0))
    return -float(np.sum(every * learnt)) / count


def _first_tokens_gradient(
    logits: Array, targets: Array, d_out: Array, temperature: float = 1.0
) -> Array:
    first = d_out[targets != IGNORE][:1]
    same = np.full_like(d_out, first[0] if first.size else 0.0)
    return divergence.log_probs_vjp(logits, targets, same, temperature)


def _zero_with_ignored(logits: Array, targets: Array, count: int) -> Array:
    d_logits = sft.token_loss_vjp(logits, targets, count)
    return d_logits * bool(np.all(targets != IGNORE))


# The reward model.


def _margin_broadcast(chosen: Array, rejected: Array, margins: Array, count: int) -> float:
    gaps = (chosen[:, None] - rejected[:, None] - margins).ravel()  # [B, B]
    zeros = np.zeros_like(gaps)
    return reward.pair_loss(gaps, zeros, zeros, count * len(chosen))


def _margin_broadcast_vjp(
    chosen: Array, rejected: Array, margins: Array, count: int
) -> tuple[Array, Array]:
    gaps = chosen[:, None] - rejected[:, None] - margins  # [B, B]
    d_chosen: Array = -ops.sigmoid(-gaps).mean(axis=1) / count
    return d_chosen, -d_chosen


def _margin_added(chosen: Array, rejected: Array, margins: Array, count: int) -> float:
    return reward.pair_loss(chosen, rejected, -margins, count)


def _margin_added_vjp(
    chosen: Array, rejected: Array, margins: Array, count: int
) -> tuple[Array, Array]:
    return reward.pair_loss_vjp(chosen, rejected, -margins, count)


def _margin_forgotten(chosen: Array, rejected: Array, margins: Array, count: int) -> float:
    return reward.pair_loss(chosen, rejected, np.zeros_like(margins), count)


def _margin_forgotten_vjp(
    chosen: Array, rejected: Array, margins: Array, count: int
) -> tuple[Array, Array]:
    return reward.pair_loss_vjp(chosen, rejected, np.zeros_like(margins), count)


# Each of these reads a score at another slot, and gives its gradient there.


def _slots(mask: Array, at: Array) -> Array:
    """Return a mask that is True at one slot of each row [B]."""
    only = np.zeros_like(mask)
    only[np.arange(len(mask)), at] = True
    return only


def _length_from_left(mask: Array) -> Array:
    return _slots(mask, mask.sum(axis=1) - 1)


def _before_the_end(mask: Array) -> Array:
    return _slots(mask, last_real(mask)[1] - 1)


def _last_slot(mask: Array) -> Array:
    return _slots(mask, np.full(len(mask), mask.shape[1] - 1))


def _read_at(slots: Callable[[Array], Array]) -> dict[str, Any]:
    """Return a mutant's fields for scores that are read at other slots."""
    return {
        "replacement": lambda values, mask: reward.score_at(values, slots(mask)),
        "also": {"score_at_vjp": lambda mask, d: reward.score_at_vjp(slots(mask), d)},
    }


def _threshold_of_score(helpful: Array, safe: Array, tagged: Array) -> Array:
    return np.where(tagged | (safe < reward.UNSAFE_BELOW), safe, helpful)


def _tag_ignored(helpful: Array, safe: Array, tagged: Array) -> Array:
    return reward.combined_score(helpful, safe, np.zeros_like(tagged))


# Divergence.


def _no_temperature(logits: Array, targets: Array, temperature: float = 1.0) -> Array:
    return divergence.log_probs(logits, targets)


def _log_probs_divided(logits: Array, targets: Array, temperature: float = 1.0) -> Array:
    return divergence.log_probs(logits, targets) / temperature


def _k1_inverted(log_p: Array, log_ref: Array, mask: Array) -> Array:
    return divergence.k1(log_ref, log_p, mask)


def _k3_inverted(log_p: Array, log_ref: Array, mask: Array) -> Array:
    return divergence.k3(log_ref, log_p, mask)


def _k3_as_loss(logits: Array, ref_logits: Array, mask: Array, d_out: Array) -> Array:
    difference = np.exp(divergence.log_softmax(logits)) - np.exp(divergence.log_softmax(ref_logits))
    return select(d_out[..., None] * difference, mask[..., None])


def _entropy_of_padding(logits: Array, mask: Array) -> Array:
    return divergence.entropy(logits, np.ones_like(mask))


# Rewards and advantages.


def _kl_added(scores: Array, log_p: Array, log_ref: Array, mask: Array, beta: float) -> Array:
    return policy.kl_rewards(scores, log_p, log_ref, mask, -beta)


def _kl_of_padding(scores: Array, log_p: Array, log_ref: Array, mask: Array, beta: float) -> Array:
    rewards = policy.kl_rewards(scores, log_p, log_ref, mask, beta)
    return np.where(mask, rewards, -beta * (log_p - log_ref))


def _score_after_end(
    scores: Array, log_p: Array, log_ref: Array, mask: Array, beta: float
) -> Array:
    rewards = policy.kl_rewards(np.zeros_like(scores), log_p, log_ref, mask, beta)
    rows, last = last_real(mask)
    kept = last + 1 < mask.shape[1]
    rewards[rows[kept], last[kept] + 1] += scores[rows[kept]]
    return rewards


def _gae_over(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> Any:
    """Return GAE over every slot, masked at the end."""
    found = policy.gae(rewards, values, np.ones_like(mask), gamma, lam)
    return tuple(select(x, mask) for x in found)


def _bootstrapped_from_padding(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> Any:
    return _gae_over(select(rewards, mask), values, mask, gamma, lam)


def _through_tool_tokens(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> Any:
    return _gae_over(select(rewards, mask), select(values, mask), mask, gamma, lam)


def _rewards_for_returns(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> Any:
    return policy.gae(rewards, values, mask, gamma, lam)[0], select(rewards, mask)


def _mean_over_padding(
    values: Array, mask: Array, *, joint: Moments | None = None, **kw: Any
) -> Array:
    of = moments(values, mask) if joint is None else joint
    everywhere = float(np.sum(select(values, mask))) / values.size
    return masked.whiten(values, mask, joint=of._replace(mean=everywhere), **kw)


def _mean_added_again(
    values: Array, mask: Array, *, joint: Moments | None = None, **kw: Any
) -> Array:
    return masked.whiten(values, mask, joint=joint, **{**kw, "mean": "kept"})


def _own_process(values: Array, mask: Array, *, joint: Moments | None = None, **kw: Any) -> Array:
    return masked.whiten(values, mask, **kw)


def _deviation_by_squares(rewards: Array, mask: Array, **kw: Any) -> Array:
    out = np.zeros_like(rewards)
    for b, g in zip(*np.nonzero(mask), strict=True):
        others = np.delete(rewards[b], g)[np.delete(mask[b], g)]
        n = rewards.dtype.type(max(len(others), 1))
        mean, mean_square = others.sum() / n, (others * others).sum() / n
        out[b, g] = (rewards[b, g] - mean) / (np.sqrt(np.abs(mean_square - mean * mean)) or 1)
    return out


def _no_answer_counts(rewards: Array, mask: Array, **kw: Any) -> Array:
    found = policy.group_advantage(select(rewards, mask), np.ones_like(mask), **kw)
    return select(found, mask)


# PPO's losses.


def _own_tokens(log_p: Array, old: Array, adv: Array, mask: Array, count: int, **kw: Any) -> float:
    own = policy.loss_count(mask, kw.get("mean", "token"))
    return policy.policy_loss(log_p, old, adv, mask, max(own, 1), **kw)


def _rows_for_tokens(
    log_p: Array, old: Array, adv: Array, mask: Array, count: int, **kw: Any
) -> float:
    return policy.policy_loss(log_p, old, adv, mask, count, **{**kw, "mean": "sequence"})


def _terms(log_p: Array, old: Array, adv: Array, clip: float = 0.2) -> Array:
    """Return the loss of each slot, masked or not."""
    ratio = np.exp(log_p - old)
    terms: Array = -np.minimum(ratio * adv, np.clip(ratio, 1 - clip, 1 + clip) * adv)
    return terms


def _padding_averaged(
    log_p: Array, old: Array, adv: Array, mask: Array, count: int, *, mean: str = "token", **kw: Any
) -> float:
    if mean == "token":
        return policy.policy_loss(log_p, old, adv, mask, count, **kw)
    slots = float(count * mask.shape[1])
    return float(np.sum(select(_terms(log_p, old, adv), mask))) / slots


def _empty_row_is_nan(
    log_p: Array, old: Array, adv: Array, mask: Array, count: int, *, mean: str = "token", **kw: Any
) -> float:
    if mean == "token":
        return policy.policy_loss(log_p, old, adv, mask, count, **kw)
    rows = select(_terms(log_p, old, adv), mask).sum(axis=1) / mask.sum(axis=1)
    return float(np.sum(rows)) / count


def _policy_times_mask(
    log_p: Array, old: Array, adv: Array, mask: Array, count: int, *, mean: str = "token", **kw: Any
) -> float:
    weights = policy.loss_weights(mask, count, mean)
    return float(np.sum(_terms(log_p, old, adv) * weights))


def _clipped_on_both_sides(
    log_p: Array, old: Array, adv: Array, mask: Array, count: int, *, clip: float = 0.2, **kw: Any
) -> Array:
    found = policy.policy_loss_vjp(log_p, old, adv, mask, count, clip=clip, **kw)
    return select(found, np.abs(np.exp(divergence.k1(log_p, old, mask)) - 1) <= clip)


def _cut_rows_counted(mask: Array, mean: str = "token") -> int:
    return len(mask) if mean == "sequence" else policy.loss_count(mask, mean)


def _value_loss_clamped(values: Array, returns: Array, mask: Array, count: int, **kw: Any) -> Array:
    found = policy.value_loss_vjp(values, returns, mask, count, **kw)
    return select(found, (select(values, mask) - select(returns, mask)) ** 2 / 2 <= 0.2)


FINE_TUNING = (
    Mutant(
        "prompt_learnt",
        "the prompt is learnt too: the template marks no answer",
        "Megatron-Bridge#3359, liquid-finetune#37",
        "sft_labels",
        _all_learnt,
    ),
    Mutant(
        "end_never_learnt",
        "the end token's id is the padding's and is ignored everywhere",
        "trl#976, trl#1623, trl#3091",
        "sft_labels",
        _end_ids_ignored,
    ),
    Mutant(
        "end_outside_the_answer",
        "the answer's mask stops before its end token",
        "trl#5988",
        "sft_labels",
        _end_outside,
    ),
    Mutant(
        "border_before_generation_prompt",
        "the answer begins where the prompt without its generation prompt ends",
        "trl#4147, trl#4201",
        "sft_labels",
        _border_early,
    ),
    Mutant(
        "labels_not_shifted",
        "a token's target is the token itself",
        COMMON_SLIP,
        "sft_labels",
        _not_shifted,
    ),
    Mutant(
        "gatt_every_answer_learnt",
        "Ghost Attention learns the earlier answers, which were sampled with the instruction",
        COMMON_SLIP,
        "gatt_dialogue",
        _gatt_all_answers,
    ),
    Mutant(
        "gatt_instruction_in_every_turn",
        "Ghost Attention keeps the instruction in every turn",
        COMMON_SLIP,
        "gatt_dialogue",
        _gatt_every_turn,
    ),
    Mutant(
        "packed_see_each_other",
        "packed conversations attend to those before them, and positions run on",
        "transformers#46634, LlamaFactory#7318, nanoVLM#204, functionary#265",
        "pack",
        _see_each_other,
    ),
    Mutant(
        "packed_border_learnt",
        "the next conversation's first token is learnt from the one before",
        COMMON_SLIP,
        "pack",
        _border_learnt,
    ),
    Mutant(
        "token_loss_of_own_mean",
        "a micro-batch's loss is divided by its own learnt tokens",
        "nanochat#59, nanochat#400, mlx-lm#1413, mlx-lm#1544, prime-rl#1957",
        "token_loss",
        _mean_of_own,
    ),
    Mutant(
        "nothing_to_learn_is_nan",
        "a micro-batch without a learnt token has the loss 0 / 0",
        "nanochat#590, nanochat#619, nanochat#834",
        "token_loss",
        _nothing_to_learn_is_nan,
    ),
    Mutant(
        "token_loss_times_mask",
        "masked losses are multiplied by 0, which leaves NaN",
        "OpenRLHF#1240",
        "token_loss",
        _loss_times_mask,
    ),
    Mutant(
        "first_tokens_gradient",
        "every token's gradient is multiplied by the first one's",
        "Liger-Kernel#1298, Liger-Kernel#968",
        "log_probs_vjp",
        _first_tokens_gradient,
    ),
    Mutant(
        "no_gradient_with_ignored",
        "one ignored target makes the whole gradient zero",
        "Liger-Kernel#678",
        "token_loss_vjp",
        _zero_with_ignored,
    ),
    Mutant(
        "margin_broadcast",
        "margins [B] beside scores [B, 1] become a matrix of all pairs of pairs",
        "ms-swift#9927",
        "pair_loss",
        _margin_broadcast,
        also={"pair_loss_vjp": _margin_broadcast_vjp},
    ),
    Mutant(
        "margin_added",
        "the margin is added to the gap, which asks for a smaller one",
        COMMON_SLIP,
        "pair_loss",
        _margin_added,
        also={"pair_loss_vjp": _margin_added_vjp},
    ),
    Mutant(
        "margin_forgotten",
        "the loss has no margin, whatever the strength",
        COMMON_SLIP,
        "pair_loss",
        _margin_forgotten,
        also={"pair_loss_vjp": _margin_forgotten_vjp},
    ),
    Mutant(
        "score_counted_from_left",
        "the score is read at the row's length, which left padding moves",
        "transformers#35352, transformers#35909, trl#937",
        "score_at",
        **_read_at(_length_from_left),
    ),
    Mutant(
        "score_before_the_end",
        "the score is read one token before the end token",
        "gpt-neox#1285, transformers#46782",
        "score_at",
        **_read_at(_before_the_end),
    ),
    Mutant(
        "score_at_last_slot",
        "the score is read at a padded slot",
        COMMON_SLIP,
        "score_at",
        **_read_at(_last_slot),
    ),
    Mutant(
        "threshold_of_linear_score",
        "0.15 is compared with the safety score before sigmoid",
        COMMON_SLIP,
        "combined_score",
        _threshold_of_score,
    ),
    Mutant(
        "safety_tag_ignored",
        "the safety score counts only where it is low",
        COMMON_SLIP,
        "combined_score",
        _tag_ignored,
    ),
    Mutant(
        "temperature_left_out",
        "log-probabilities are of temperature 1, the tokens are not",
        "trl#4159, prime-rl#697",
        "log_probs",
        _no_temperature,
    ),
    Mutant(
        "log_probs_divided",
        "the temperature divides log-probabilities in place of logits",
        "OpenRLHF#853, NeMo-RL#935, miles#1345",
        "log_probs",
        _log_probs_divided,
    ),
    Mutant(
        "k1_inverted", "k1 has the ratio upside down", "rlhf-book#489, PAE#8", "k1", _k1_inverted
    ),
    Mutant("k3_inverted", "k3 has the ratio upside down", "rlhf-book#489", "k3", _k3_inverted),
    Mutant(
        "k3_as_loss",
        "the KL's gradient is k3's, which is that of the other direction",
        "verl#2953, slime#1004, OpenRLHF#1101, OpenRLHF#1309, trl#6503",
        "exact_kl_vjp",
        _k3_as_loss,
    ),
    Mutant(
        "entropy_of_padding",
        "padded slots are part of the entropy",
        "trl#6803",
        "entropy",
        _entropy_of_padding,
    ),
    Mutant(
        "kl_added",
        "the divergence is added to the reward",
        "optimate#298",
        "kl_rewards",
        _kl_added,
    ),
    Mutant(
        "kl_of_padding",
        "padded slots have a divergence too",
        "rlhf-book#216",
        "kl_rewards",
        _kl_of_padding,
    ),
    Mutant(
        "score_after_the_end",
        "the score is given one slot after the end token",
        "trl#3750, trl#5338",
        "kl_rewards",
        _score_after_end,
    ),
    Mutant(
        "advantage_from_padding",
        "the last token's advantage takes the critic's value of a padded slot",
        "ROLL#447, verl#50",
        "gae",
        _bootstrapped_from_padding,
    ),
    Mutant(
        "advantage_through_tool_tokens",
        "slots that the policy did not fill count as steps",
        "miles#1827",
        "gae",
        _through_tool_tokens,
    ),
    Mutant(
        "rewards_for_returns",
        "the critic learns rewards in place of returns",
        "rlhf-book#216",
        "gae",
        _rewards_for_returns,
    ),
    Mutant(
        "mean_over_padding",
        "whitening's mean counts padded slots, its variance does not",
        "SkyRL#1305, SkyRL#1782",
        "whiten",
        _mean_over_padding,
    ),
    Mutant(
        "mean_added_again",
        "the mean is added again to what was to be whitened",
        "slime#1369",
        "whiten",
        _mean_added_again,
    ),
    Mutant(
        "whitened_by_process",
        "each process whitens by its own moments",
        "slime#2235, miles#3229",
        "whiten",
        _own_process,
    ),
    Mutant(
        "deviation_by_squares",
        "a group's deviation is the root of mean(r^2) - mean(r)^2",
        "NeMo-RL#4158",
        "group_advantage",
        _deviation_by_squares,
    ),
    Mutant(
        "no_answer_in_the_group",
        "a sample without an answer shifts its group's mean",
        "OpenRLHF#1239",
        "group_advantage",
        _no_answer_counts,
    ),
    Mutant(
        "policy_loss_of_own_mean",
        "a micro-batch's policy loss is divided by its own tokens",
        "unsloth#1178, torchtune#2334, trl#6024, ms-swift#10117",
        "policy_loss",
        _own_tokens,
    ),
    Mutant(
        "mean_of_rows_for_tokens",
        "rows are averaged where tokens were to be",
        "open-instruct#1137",
        "policy_loss",
        _rows_for_tokens,
    ),
    Mutant(
        "row_mean_over_padding",
        "a row's mean counts its padding",
        "AReaL#1346",
        "policy_loss",
        _padding_averaged,
    ),
    Mutant(
        "empty_row_is_nan",
        "a row that is masked whole has the mean 0 / 0",
        "open-instruct#1625",
        "policy_loss",
        _empty_row_is_nan,
    ),
    Mutant(
        "policy_loss_times_mask",
        "masked losses are multiplied by 0, which leaves NaN",
        "AReaL#1347",
        "policy_loss",
        _policy_times_mask,
    ),
    Mutant(
        "clipped_on_both_sides",
        "a ratio beyond the clip has no gradient even where the plain objective is the smaller",
        DERIVATION_SLIP,
        "policy_loss_vjp",
        _clipped_on_both_sides,
    ),
    Mutant(
        "cut_answers_counted",
        "answers left out of the loss are still counted",
        "trl#6369",
        "loss_count",
        _cut_rows_counted,
    ),
    Mutant(
        "value_loss_clamped",
        "a large value loss is clamped to a constant, which teaches nothing",
        "ray#19291, ray#22171",
        "value_loss_vjp",
        _value_loss_clamped,
    ),
)
