"""What a reward model minimises: the loss of pairs of answers, and the share that it ranks right.

Suffixes: B row (an answer with its conversation; those of a pair follow each other, the chosen one
first), P pair.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ..data import preferences
from ..model.llama import Llama
from ..model.pair_loss import backward_scores, pair_losses, safety_losses, scores_at
from ..model.reward import RewardModel
from .batch import Batch
from .objective import Measured

# How much better the chosen answer was judged; a pair without a judgement has the last.
STRENGTHS = (*preferences.STRENGTHS, "strength not given")
# The margin m(r) by strength (table 27): what the paper tried. It does not say which of the two the
# released models had.
MARGINS: Mapping[str, Sequence[float]] = {
    "small": (1.0, 2 / 3, 1 / 3, 0.0, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0, 0.0),
    "none": (0.0,) * 5,
}
# A mean loss above this has exploded: scores that far apart the wrong way have no gradient of use.
LARGEST_LOSS = 100.0


class Column(IntEnum):
    """The columns of a micro-batch's targets, int64 [B, 4]."""

    LAST = 0  # index of the row's last token; -1 = the row is empty, and so is the pair's other
    STRENGTH = 1  # index into STRENGTHS
    TAGGED = 2  # 1 where the pair is of the safety data
    SAFE = 3  # 1 for a safe answer, 0 for an unsafe one, -1 for one that is not labelled


class PairLoss:
    """The mean over pairs of ``-log sigmoid(r_c - r_r - m)``; implements Objective.

    With a ``safety_weight`` that times the mean auxiliary safety loss over labelled answers is
    added.
    """

    model_class: type[Llama] = RewardModel
    names: Sequence[str] = ("accuracy", "gap")

    def __init__(self, margin: str = "none", safety_weight: float = 0.0) -> None:
        self.margins = torch.tensor(MARGINS[margin], dtype=torch.float64)
        self.safety_weight = safety_weight
        self.latest = torch.zeros(len(self.names), dtype=torch.float64)

    def counts(self, batch: Batch) -> Sequence[int]:
        """Return the numbers of pairs and of labelled answers."""
        n_pairs = int((batch.targets[::2, Column.LAST] >= 0).sum())
        return n_pairs, int((batch.targets[:, Column.SAFE] >= 0).sum())

    def scores(self, hidden_BTD: Tensor, head: Tensor, batch: Batch) -> Tensor:
        """Return the scores [B] of a micro-batch's rows."""
        return scores_at(hidden_BTD, head, batch.targets[:, Column.LAST])

    def backward(
        self, hidden_BTD: Tensor, head: Tensor, batch: Batch, divisors: Sequence[float]
    ) -> Tensor:
        """Run the backward pass; return the loss, the share of pairs ranked right, the mean gap."""
        n_pairs, n_labelled = divisors
        last_B = batch.targets[:, Column.LAST]
        with torch.no_grad():
            scores_B = self.scores(hidden_BTD, head, batch)
            sums, (d_pair_B, d_safety_B) = self._terms(scores_B, batch.targets)
            d_scores_B = d_pair_B / n_pairs + self.safety_weight * d_safety_B / n_labelled
        backward_scores(hidden_BTD, head, last_B, d_scores_B)
        loss, safety, right, gap = sums
        parts = [loss / n_pairs + self.safety_weight * safety / n_labelled]
        return torch.stack([*parts, right / n_pairs, gap / n_pairs])

    def sums(self, hidden_BTD: Tensor, head: Tensor, batch: Batch) -> Tensor:
        """Return a validation batch's sums: losses, gap, counts, and the cells of the table.

        float64 [4 + 4 S]: of pairs the loss, the gap of scores and of answers the safety loss and
        their number; then for each of S strengths, not tagged and tagged, pairs and right ones.
        """
        scores_B = self.scores(hidden_BTD, head, batch)
        (loss, safety, _, gap), _ = self._terms(scores_B, batch.targets)
        n_labelled = (batch.targets[:, Column.SAFE] >= 0).sum()
        right_P, is_pair_P = _ranked_right(scores_B, batch.targets)
        cell_P = 2 * batch.targets[::2, Column.STRENGTH] + batch.targets[::2, Column.TAGGED]
        cells = torch.zeros(2 * len(STRENGTHS), 2, dtype=torch.float64, device=scores_B.device)
        ones = torch.stack([is_pair_P, right_P], 1).double()
        cells.index_add_(0, cell_P, ones)
        return torch.cat([torch.stack([loss, gap, safety, n_labelled.double()]), cells.flatten()])

    def measured(self, sums: Sequence[float]) -> Measured:
        """Return loss, accuracy and gap over all pairs, and the accuracy's table."""
        loss, gap, safety, n_labelled = sums[:4]
        cells = torch.tensor(sums[4:], dtype=torch.float64).view(len(STRENGTHS), 2, 2)
        n_pairs, n_right = cells.sum((0, 1)).tolist()
        total = loss / n_pairs + self.safety_weight * safety / max(n_labelled, 1)
        values = {"accuracy": n_right / n_pairs, "gap": gap / n_pairs}
        return Measured(total, values, accuracy_table(cells))

    def largest_loss(self, vocab_size: int) -> float:
        """Return the largest loss of a step that has not exploded."""
        return LARGEST_LOSS

    def _terms(
        self, scores_B: Tensor, targets: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return sums, float64, and the derivatives [B] of the two losses by the scores.

        The sums are the pairs' loss, the safety loss, the number of pairs ranked right, and the
        gap of their scores.
        """
        chosen_P, rejected_P = scores_B.view(-1, 2).unbind(1)
        right_P, is_pair_P = _ranked_right(scores_B, targets)
        margins = self.margins.to(scores_B)
        margins_P = margins[targets[::2, Column.STRENGTH]]
        loss_P, d_chosen_P = pair_losses(chosen_P, rejected_P, margins_P)
        d_chosen_P = d_chosen_P.where(is_pair_P, 0)
        d_pair_B = torch.stack([d_chosen_P, -d_chosen_P], 1).flatten()
        is_labelled_B = targets[:, Column.SAFE] >= 0
        safety_B, d_safety_B = safety_losses(scores_B, targets[:, Column.SAFE] > 0)
        gap_P = (chosen_P - rejected_P).where(is_pair_P, 0)
        kept = loss_P.where(is_pair_P, 0), safety_B.where(is_labelled_B, 0), right_P, gap_P
        loss, safety, right, gap = (x.sum(dtype=torch.float64) for x in kept)
        return (loss, safety, right, gap), (d_pair_B, d_safety_B.where(is_labelled_B, 0))


def _ranked_right(scores_B: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return bool [P] each: is the chosen answer's score the greater, and is there a pair."""
    chosen_P, rejected_P = scores_B.view(-1, 2).unbind(1)
    is_pair_P = targets[::2, Column.LAST] >= 0
    return (chosen_P > rejected_P) & is_pair_P, is_pair_P


def accuracy_table(cells: Tensor) -> list[str]:
    """Return lines of accuracies by strength, as the paper's tables 7 and 8 have them.

    cells  float64 [S, 2, 2]: for each of STRENGTHS, not tagged and tagged, pairs and right ones.

    Strengths of which there is no pair are left out, and so are the columns of the safety tag where
    there is none.
    """
    is_tagged = bool(cells[:, 1, 0].sum())
    columns = [("all pairs", cells.sum(1))]
    if is_tagged:
        columns += [("tagged safety", cells[:, 1]), ("not tagged", cells[:, 0])]
    rows = {name: i for i, name in enumerate(STRENGTHS) if cells[i, :, 0].sum()}
    lines = [f"{'accuracy':<22}" + "".join(f"{name:>20}" for name, _ in columns)]
    for name, i in rows.items():
        lines.append(f"{name:<22}" + "".join(_cell(*counts[i].tolist()) for _, counts in columns))
    if len(rows) > 1:
        whole = (_cell(*counts.sum(0).tolist()) for _, counts in columns)
        lines.append(f"{'together':<22}" + "".join(whole))
    return lines


def _cell(n_pairs: float, n_right: float) -> str:
    """Return a table's cell, 20 columns wide: the share of pairs ranked right, and their number."""
    share = f"{n_right / n_pairs:.1%} of {int(n_pairs):,}" if n_pairs else "-"
    return f"{share:>20}"
