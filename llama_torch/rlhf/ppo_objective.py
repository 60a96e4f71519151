"""What PPO minimises: the clipped policy loss and the value loss of drawn answers.

Suffixes: B answer, T position, P positions with a drawn token, D dim, V vocabulary.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ..model.drawn_loss import add_gradient, backward_log_probs
from ..model.llama import Llama
from ..model.loss import IGNORE_INDEX
from ..model.policy import ValuedPolicy
from ..ppo_config import PpoConfig
from ..training.batch import Batch
from ..training.objective import Measured


class Field(IntEnum):
    """The rows of a window, float64 [10, T], which is one answer; and of targets [B, 10, T]."""

    TOKEN = 0
    TARGET = 1  # the next token where it was drawn, else IGNORE_INDEX
    LOG_OLD = 2  # its log-probability before the first of the updates that read it
    LOG_REFERENCE = 3
    ADVANTAGE = 4
    RETURN = 5
    # Of the whole answer, at every position.
    SCORE = 6  # before whitening
    ENDED = 7  # 1 where an end token ended it
    ENTROPY = 8  # mean over its tokens when it was drawn
    MISMATCH = 9  # largest |log-probability of the sampler - LOG_OLD| of all drawn together


class PpoLoss:
    """The policy's loss, plus a weight times the value's; implements Objective.

    With ``kl`` "loss" beta times k2 is added, whose mean gradient is that of the divergence.
    """

    names: Sequence[str] = (
        *("reward", "kl", "entropy", "clipped", "value_loss", "length", "ended", "mismatch"),
    )

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        has_value = config.advantages == "value"
        self.model_class: type[Llama] = ValuedPolicy if has_value else Llama
        self.value_head: Tensor | None = None  # [1, D]; set when the model is built
        self.latest = torch.zeros(len(self.names), dtype=torch.float64)

    def counts(self, batch: Batch) -> Sequence[int]:
        """Return the numbers of drawn tokens and of answers."""
        is_drawn_BT = batch.targets[:, Field.TARGET] != IGNORE_INDEX
        return int(is_drawn_BT.sum()), len(is_drawn_BT)

    def backward(
        self, hidden_BTD: Tensor, head: Tensor, batch: Batch, divisors: Sequence[float]
    ) -> Tensor:
        """Run the backward pass; return the loss and what ``names`` lists."""
        n_tokens, n_answers = divisors
        mask_BT = batch.targets[:, Field.TARGET] != IGNORE_INDEX
        hidden_PD = hidden_BTD.detach()[mask_BT]
        column = {field: batch.targets[:, field][mask_BT] for field in list(Field)[1:6]}
        weights_P = self._weights(mask_BT, divisors)[mask_BT]
        terms = PolicyTerms(self.config, column, weights_P)
        targets_P = column[Field.TARGET].long()
        log_p_P, entropy_P, d_hidden_PD = backward_log_probs(
            hidden_PD, head, targets_P, self.config.temperature, terms.derivatives
        )
        policy_loss, n_clipped = terms.loss(log_p_P), terms.clipped(log_p_P).sum()
        value_loss = torch.zeros_like(policy_loss)
        if self.value_head is not None:
            value_loss = self._backward_value(hidden_PD, column, weights_P, d_hidden_PD)
        d_hidden_BTD = torch.zeros_like(hidden_BTD)
        d_hidden_BTD[mask_BT] = d_hidden_PD
        hidden_BTD.backward(d_hidden_BTD)
        per_token = torch.stack([entropy_P.double().sum(), n_clipped.double()]) / n_tokens
        score, kl, length, ended, mismatch = answer_sums(batch.targets) / n_answers
        loss = policy_loss + self.config.value_weight * value_loss
        measures = loss, score, kl, *per_token, value_loss, length, ended, mismatch
        return torch.stack([one.double() for one in measures])

    def sums(self, hidden_BTD: Tensor, head: Tensor, batch: Batch) -> Tensor:
        """Return a validation batch's sums, float64 [7], of answers that the model has drawn."""
        targets = batch.targets
        n_answers = targets.new_tensor([len(targets)])
        entropy = targets[:, Field.ENTROPY, :1].sum(0)
        return torch.cat([answer_sums(targets), entropy, n_answers])

    def measured(self, sums: Sequence[float]) -> Measured:
        """Return what is maximised, mean score - beta KL, as a loss, and its parts."""
        score, kl, length, ended, mismatch, entropy = (x / sums[-1] for x in sums[:-1])
        values = {"reward": score, "kl": kl, "entropy": entropy, "length": length, "ended": ended}
        return Measured(self.config.kl_weight * kl - score, {**values, "mismatch": mismatch})

    def largest_loss(self, vocab_size: int) -> float:
        """Return infinity: of a policy's loss only its being finite says whether it is sane."""
        return math.inf

    def _weights(self, mask_BT: Tensor, divisors: Sequence[float]) -> Tensor:
        """Return each drawn token's weight in a loss, float64 [B, T]."""
        n_tokens, n_answers = divisors
        if self.config.mean == "token":
            return mask_BT.double() / n_tokens
        return mask_BT / (n_answers * mask_BT.sum(1, keepdim=True).double())

    def _backward_value(
        self,
        hidden_PD: Tensor,
        column: dict[Field, Tensor],
        weights_P: Tensor,
        d_hidden_PD: Tensor,
    ) -> Tensor:
        """Add the value head's gradient and its part of d_hidden; return the value loss."""
        assert self.value_head is not None
        errors_P = values_at(hidden_PD, self.value_head).double() - column[Field.RETURN]
        d_values_P = (self.config.value_weight * weights_P * errors_P).to(_wide(hidden_PD))
        head_D = self.value_head.detach()[0].to(d_values_P)
        add_gradient(self.value_head, (d_values_P @ hidden_PD.to(d_values_P))[None])
        d_hidden_PD += (d_values_P[:, None] * head_D).to(d_hidden_PD.dtype)
        return (weights_P * errors_P.square() / 2).sum()


class PolicyTerms:
    """The policy's loss of each drawn token, from its log-probability: float64 [P]."""

    def __init__(self, config: PpoConfig, column: dict[Field, Tensor], weights_P: Tensor) -> None:
        self.clip, self.weights_P = config.policy_clip, weights_P
        self.beta = config.kl_weight if config.kl == "loss" else 0.0
        self.old_P, self.reference_P = column[Field.LOG_OLD], column[Field.LOG_REFERENCE]
        self.advantages_P = column[Field.ADVANTAGE]

    def derivatives(self, log_p_P: Tensor, part: slice) -> Tensor:
        """Return the derivatives by a part of the log-probabilities."""
        plain, clipped = self._objectives(log_p_P, part)
        of_policy = -plain.where(plain <= clipped, 0)
        of_divergence = self.beta * (log_p_P.double() - self.reference_P[part])
        return self.weights_P[part] * (of_policy + of_divergence)

    def loss(self, log_p_P: Tensor) -> Tensor:
        """Return the weighted sum, a float64 scalar."""
        plain, clipped = self._objectives(log_p_P, slice(None))
        k2_P = (log_p_P.double() - self.reference_P).square() / 2
        return (self.weights_P * (self.beta * k2_P - torch.minimum(plain, clipped))).sum()

    def clipped(self, log_p_P: Tensor) -> Tensor:
        """Return whether a token has no gradient as its ratio is beyond the clip: bool [P]."""
        plain, clipped = self._objectives(log_p_P, slice(None))
        return plain > clipped

    def _objectives(self, log_p_P: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Return ratio times advantage, and clipped ratio times advantage."""
        ratio = (log_p_P.double() - self.old_P[part]).exp()
        advantages = self.advantages_P[part]
        return ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages


def values_at(hidden_PD: Tensor, value_head_1D: Tensor) -> Tensor:
    """Return the values [P] of hidden states, in float32 or wider."""
    wide = _wide(hidden_PD)
    return hidden_PD.to(wide) @ value_head_1D.detach()[0].to(wide)


def answer_sums(targets: Tensor) -> Tensor:
    """Return sums over answers of score, divergence, length, ended and mismatch: float64 [5]."""
    is_drawn_BT = targets[:, Field.TARGET] != IGNORE_INDEX
    kl_BT = (targets[:, Field.LOG_OLD] - targets[:, Field.LOG_REFERENCE]).where(is_drawn_BT, 0)
    score, ended, mismatch = (
        targets[:, field, 0].sum() for field in (Field.SCORE, Field.ENDED, Field.MISMATCH)
    )
    return torch.stack([score, kl_BT.sum(), is_drawn_BT.sum().double(), ended, mismatch])


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32
