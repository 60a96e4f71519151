"""Faults of a PPO loop, each planted into the trainer's own code.

A fault is a function that changes the code through a monkeypatch; its first line says what is
wrong then. ``FAULTS`` names the run that shows each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_torch.rlhf import ppo_rewards, ppo_rollouts, ppo_source
from llama_torch.rlhf.ppo_objective import Field, PolicyTerms, PpoLoss
from llama_torch.training import loop

from . import ppo_faults_drawn as drawn
from .ppo_faults_drawn import Patch, wrapped


def mean_of_means(patch: Patch) -> None:
    """A micro-batch's loss is the mean over its own tokens, and a step's the mean of these."""

    def change(real: Any, self: PpoLoss, mask: Tensor, divisors: Any) -> Any:
        return mask.double() / mask.sum() / (divisors[1] / len(mask))

    wrapped(patch, PpoLoss, "_weights", change)


def rows_for_tokens(patch: Patch) -> None:
    """Answers are averaged where tokens were to be."""

    def change(real: Any, self: PpoLoss, mask: Tensor, divisors: Any) -> Any:
        return mask / (divisors[1] * mask.sum(1, keepdim=True).double())

    wrapped(patch, PpoLoss, "_weights", change)


def never_clipped(patch: Patch) -> None:
    """The ratio is not clipped."""

    def change(real: Any, self: PolicyTerms, *given: Any) -> Any:
        plain, _ = real(self, *given)
        return plain, plain

    wrapped(patch, PolicyTerms, "_objectives", change)


def clipped_on_both_sides(patch: Patch) -> None:
    """A ratio beyond the clip has no gradient even where the plain objective is the smaller."""

    def change(real: Any, self: PolicyTerms, log_p: Tensor, part: slice) -> Any:
        ratio = (log_p.double() - self.old_P[part]).exp()
        return real(self, log_p, part).where((ratio - 1).abs() <= self.clip, 0)

    wrapped(patch, PolicyTerms, "derivatives", change)


def k3_as_loss(patch: Patch) -> None:
    """The divergence in the loss has k3's gradient, which is that of the other direction."""

    def change(real: Any, self: PolicyTerms, log_p: Tensor, part: slice) -> Any:
        beta, d = self.beta, log_p.double() - self.reference_P[part]
        self.beta = 0.0
        of_policy = real(self, log_p, part)
        self.beta = beta
        return of_policy - self.weights_P[part] * beta * torch.expm1(-d)

    wrapped(patch, PolicyTerms, "derivatives", change)


def rewards_for_returns(patch: Patch) -> None:
    """The value function learns advantages in place of returns."""

    def change(real: Any, *given: Any) -> Any:
        advantages, _ = real(*given)
        return advantages, advantages

    wrapped(patch, ppo_rollouts, "gae", change)


def discounts_swapped(patch: Patch) -> None:
    """Gamma and lambda have each other's place."""

    def change(real: Any, rewards: Tensor, values: Tensor, mask: Tensor, *two: float) -> Any:
        return real(rewards, values, mask, *reversed(two))

    wrapped(patch, ppo_rollouts, "gae", change)


def cut_answers_bootstrapped(patch: Patch) -> None:
    """After an answer that was cut its last value stands for what would have followed."""

    def change(real: Any, drawn: Any, *given: Any) -> Any:
        rows, last = torch.arange(len(drawn.ended)), ppo_rewards.last_drawn(drawn.mask)
        scores = drawn.scores + (1 - drawn.ended) * drawn.values[rows, last]
        return real(drawn._replace(scores=scores), *given)

    wrapped(patch, ppo_source, "advantages_of", change)


def unsorted_advantages(patch: Patch) -> None:
    """Answers are sorted by length, their advantages are not."""

    def change(real: Any, windows: Tensor) -> Tensor:
        found: Tensor = real(windows)
        found[:, Field.ADVANTAGE] = windows[:, Field.ADVANTAGE]
        return found

    wrapped(patch, ppo_source, "longest_first", change)


def moments_forgotten(patch: Patch) -> None:
    """The optimizer begins anew with every batch of answers."""
    taken = []

    def change(real: Any, model: Any, optimizer: Any, *given: Any, **more: Any) -> Any:
        if len(taken) % 3 == 0:
            optimizer.state.clear()
        taken.append(1)
        return real(model, optimizer, *given, **more)

    wrapped(patch, loop, "train_step", change)


# Fault -> the SETTINGS of a run that shows it.
FAULTS: dict[Callable[[Patch], None], str] = {
    drawn.stale_rollouts: "paper",
    drawn.stale_sampler: "paper",
    drawn.temperature_left_out: "warm",
    drawn.reference_follows: "paper",
    drawn.kl_added: "paper",
    drawn.score_late: "paper",
    drawn.score_not_whitened: "paper",
    drawn.advantages_not_whitened: "paper",
    drawn.whitened_with_padding: "paper",
    drawn.whitened_by_minibatch: "paper",
    drawn.advantages_after_updates: "paper",
    drawn.old_after_update: "paper",
    drawn.value_after_the_token: "paper",
    drawn.value_of_the_last_token: "paper",
    drawn.prompt_learnt: "paper",
    drawn.first_token_left_out: "paper",
    drawn.end_left_out: "paper",
    drawn.cut_answers_unpunished: "cut",
    drawn.policys_template: "paper",
    drawn.scores_of_others: "paper",
    drawn.safety_ignored: "safety",
    drawn.group_of_others: "group",
    drawn.group_unbiased: "group",
    mean_of_means: "paper",
    rows_for_tokens: "paper",
    never_clipped: "paper",
    clipped_on_both_sides: "paper",
    k3_as_loss: "loss",
    rewards_for_returns: "paper",
    discounts_swapped: "warm",
    cut_answers_bootstrapped: "paper",
    unsorted_advantages: "paper",
    moments_forgotten: "paper",
}
