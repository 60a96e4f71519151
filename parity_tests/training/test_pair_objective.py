"""The reward model's loss and gradients are the oracle's, whatever the padding and the split."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_torch.config import OptimConfig
from llama_torch.model import pair_loss
from llama_torch.model.config import ModelConfig
from llama_torch.model.reward import RewardModel
from llama_torch.training import pair_objective, step
from llama_torch.training.batch import Batch
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.pair_loading import pad_id
from llama_torch.training.pair_objective import STRENGTHS, Column, PairLoss, accuracy_table
from reference_np import reward
from reference_np.ops import IGNORE

CONFIG = ModelConfig(8, 1, 2, 1, 4, 12, 20, 16, tie_embeddings=True)
TOLERANCE = 1e-9  # of float64
ORACLES = [*reward.MARGINS["small"]]  # the oracle's names of STRENGTHS


def to_batch(rows: Sequence[Sequence[int]], columns: Any, width: int, fill: int = 0) -> Batch:
    """Return a micro-batch whose rows are padded on the right with ``fill``."""
    tokens = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    last = torch.tensor([[len(row) - 1] for row in rows])
    return Batch(tokens, torch.cat([last, torch.as_tensor(columns)], 1))


class Case:
    """Pairs of conversations, and a model in float64."""

    def __init__(self, seed: int, n_pairs: int, margin: str, weight: float) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.margin, self.weight = seed, margin, weight
        lengths = rng.integers(1, 9, 2 * n_pairs)
        self.rows = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
        strength = np.repeat(rng.integers(0, 5, n_pairs), 2)
        tagged = np.repeat(rng.integers(0, 2, n_pairs), 2)
        self.columns = np.stack([strength, tagged, rng.integers(-1, 2, 2 * n_pairs)], 1)
        self.model = RewardModel(CONFIG).double()
        self.model.init_weights(torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(8)

    def __repr__(self) -> str:
        return f"Case({self.seed}, {len(self.rows) // 2}, {self.margin!r}, {self.weight})"

    def batch(self, extra: int = 0, fill: int = 0, part: slice = slice(None)) -> Batch:
        rows = self.rows[part]
        return to_batch(rows, self.columns[part], max(map(len, rows)) + extra, fill)

    def objective(self) -> PairLoss:
        return PairLoss(self.margin, self.weight)

    def scores(self) -> Tensor:
        """Each conversation's score [B], run alone, without padding."""
        each = [self.model(torch.tensor([row]))[0][0, -1, 0] for row in self.rows]
        return torch.stack(each)

    def expected(self, scores_B: Tensor) -> tuple[float, Tensor]:
        """Return the oracle's loss, and its gradient by the scores [B]."""
        x, n = scores_B.detach().numpy(), len(self.rows) // 2
        strengths = self.columns[::2, 0].tolist()
        margins = np.array(
            [
                0.0 if self.margin == "none" or i == 4 else reward.margin(ORACLES[i], self.margin)
                for i in strengths
            ]
        )
        given = x[::2], x[1::2], margins, n
        d_x = np.empty_like(x)
        d_x[::2], d_x[1::2] = reward.pair_loss_vjp(*given)
        loss = reward.pair_loss(*given)
        labels = np.where(self.columns[:, 2] < 0, IGNORE, self.columns[:, 2])
        if self.weight and (n_labelled := int((labels != IGNORE).sum())):
            loss += self.weight * reward.safety_loss(x, labels, n_labelled)
            d_x += self.weight * reward.safety_loss_vjp(x, labels, n_labelled)
        return loss, torch.from_numpy(d_x)


def cases() -> st.SearchStrategy[Case]:
    margins, weights = st.sampled_from(["small", "large", "none"]), st.sampled_from([0.0, 0.5])
    return st.builds(Case, st.integers(0, 2**16), st.integers(1, 5), margins, weights)


def require_equal(case: Case, batches: Sequence[Batch]) -> None:
    """Require a step's loss and gradients to be the oracle's on each conversation alone."""
    scores = case.scores()
    loss, d_scores = case.expected(scores)
    case.model.zero_grad()
    scores.backward(d_scores)
    exact = {
        name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None
    }
    case.model.zero_grad()
    objective = case.objective()
    found, grads = step.accumulate(case.model, batches, objective)
    assert found.item() == pytest.approx(loss, rel=TOLERANCE)
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(grads[parameter], exact[name], rtol=TOLERANCE, atol=TOLERANCE)
    gaps = (scores[::2] - scores[1::2]).detach()
    accuracy, gap = objective.latest.tolist()
    assert accuracy == pytest.approx((gaps > 0).double().mean().item(), rel=TOLERANCE)
    assert gap == pytest.approx(gaps.mean().item(), rel=TOLERANCE, abs=TOLERANCE)


@given(case=cases(), extra=st.integers(0, 3), fill=st.integers(0, CONFIG.vocab_size - 1))
def test_padding_changes_nothing_whatever_stands_there(case: Case, extra: int, fill: int) -> None:
    require_equal(case, [case.batch(extra, fill)])


@given(case=cases(), data=st.data())
def test_micro_batches_and_empty_pairs_add_up_to_the_step(case: Case, data: st.DataObject) -> None:
    n = len(case.rows)
    cut = 2 * data.draw(st.integers(0, n // 2), label="cut")
    parts = [slice(0, cut), slice(cut, n)]
    batches = [case.batch(part=part) for part in parts if case.rows[part]]
    empty = to_batch([[], []], [[0, 0, -1]] * 2, 3, 5)
    assert case.objective().counts(empty) == (0, 0)
    require_equal(case, [*batches, empty])


@given(case=cases())
def test_a_validation_measures_what_the_step_does(case: Case) -> None:
    objective, batch = case.objective(), case.batch()
    loss, _ = step.accumulate(case.model, [batch], objective)
    with torch.no_grad():
        hidden, _ = case.model.model(batch.tokens)
        sums = objective.sums(hidden, case.model.head_weight, batch)
    found = objective.measured(sums.tolist())
    assert found.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    assert [*found.values.values()] == pytest.approx(objective.latest.tolist(), rel=TOLERANCE)


# Faults: what public trainers did, each seen by the tests above.


def broadcast(chosen: Tensor, rejected: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [P] against scores [P, 1] (ms-swift#9927)."""
    gap = chosen[:, None] - rejected[:, None] - margins
    return -torch.nn.functional.logsigmoid(gap).mean(1), -torch.sigmoid(-gap).mean(1)


def forgotten_margin(chosen: Tensor, rejected: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    return REAL_LOSSES(chosen, rejected, 0 * margins)


def at_row_end(hidden: Tensor, last: Tensor) -> Tensor:
    """The last column, padding or not (transformers#35352)."""
    return hidden[:, -1]


def before_the_end(hidden: Tensor, last: Tensor) -> Tensor:
    """The token before the last (gpt-neox#1285; where the end token pads: trl#937)."""
    return REAL_LAST(hidden, (last - 1).clamp(min=0))


REAL_LOSSES, REAL_LAST = pair_loss.pair_losses, pair_loss.last_hidden
FAULTS = {
    "broadcast": (pair_objective, "pair_losses", broadcast),
    "no margin": (pair_objective, "pair_losses", forgotten_margin),
    "row's end": (pair_loss, "last_hidden", at_row_end),
    "before the end": (pair_loss, "last_hidden", before_the_end),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_known_bug_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed=3, n_pairs=4, margin="large", weight=0.0)
    require_equal(case, [case.batch(2, 7)])
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError):
        require_equal(case, [case.batch(2, 7)])


def test_a_mean_of_micro_batch_means_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed=3, n_pairs=4, margin="large", weight=0.0)
    parts = [case.batch(part=slice(0, 2)), case.batch(part=slice(2, 8))]
    require_equal(case, parts)
    real = PairLoss.backward

    def own_count(self: PairLoss, hidden: Tensor, head: Tensor, batch: Batch, n: Any) -> Tensor:
        return real(self, hidden, head, batch, [2.0 * self.counts(batch)[0], 1.0])

    monkeypatch.setattr(PairLoss, "backward", own_count)
    with pytest.raises(AssertionError):
        require_equal(case, parts)


def test_scores_with_a_second_axis_are_refused() -> None:
    one, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(AssertionError):
        pair_loss.pair_losses(column, column, one)
    with pytest.raises(AssertionError):
        pair_loss.pair_losses(column, column, column)


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_the_score_is_the_oracles_at_the_last_real_token(fill: float) -> None:
    rng = np.random.default_rng(0)
    hidden, last = rng.standard_normal((3, 5, 4)), np.array([4, 0, 2])
    head, mask = rng.standard_normal((1, 4)), np.arange(5) <= last[:, None]
    hidden[~mask] = fill
    expected = reward.score_at(hidden @ head[0], mask)
    found = pair_loss.scores_at(*map(torch.from_numpy, (hidden, head, last)))
    assert found.numpy() == pytest.approx(expected, rel=TOLERANCE)


def test_the_margins_are_the_papers() -> None:
    for scale, margins in reward.MARGINS.items():
        assert [*margins.values()] == pytest.approx([*pair_objective.MARGINS[scale][:4]])
        for strength, name in zip(STRENGTHS[:4], margins, strict=True):
            assert strength.startswith(name)
        assert pair_objective.MARGINS[scale][4] == 0


def test_large_gaps_have_finite_losses() -> None:
    chosen = torch.tensor([1e4, -1e4, 0.0])
    loss, slope = pair_loss.pair_losses(chosen, torch.zeros(3), torch.zeros(3))
    assert loss.tolist() == pytest.approx([0.0, 1e4, math.log(2)])
    assert slope.tolist() == pytest.approx([0.0, -1.0, -0.5])


def test_a_step_learns_to_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed=1, n_pairs=4, margin="small", weight=0.0)
    optimizer, objective = make_adamw(case.model, OptimConfig()), case.objective()
    found = []
    for _ in range(30):
        given = case.model, optimizer, [case.batch()]
        loss, _ = step.train_step(*given, lr=3e-2, grad_clip=1.0, objective=objective)
        found.append(loss.item())
    assert found[-1] < 0.2 * found[0]
    assert objective.latest[0] == 1


def test_the_table_has_what_there_is() -> None:
    cells = torch.zeros(len(STRENGTHS), 2, 2, dtype=torch.float64)
    cells[0, 0] = torch.tensor([8.0, 6.0])
    assert accuracy_table(cells) == [
        f"{'accuracy':<22}{'all pairs':>20}",
        f"{'significantly better':<22}{'75.0% of 8':>20}",
    ]
    cells[3, 1] = torch.tensor([2.0, 1.0])
    last = accuracy_table(cells)[-1]
    assert last.split("  ")[0] == "together"
    assert [part.strip() for part in last[22:].split("  ") if part.strip()] == [
        *("70.0% of 10", "50.0% of 2", "75.0% of 8"),
    ]


def test_the_targets_columns_are_all_there_are() -> None:
    assert [column.value for column in Column] == [0, 1, 2, 3]


def test_padding_is_no_token_that_a_conversation_ends_with(tmp_path: Path) -> None:
    for own, last_ids, expected in (
        (None, {7}, 0),
        (None, {0, 1}, 2),
        (5, {7}, 5),
        (7, {7}, 0),
        (99, {0}, 1),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": own}))
        assert pad_id(tmp_path, 10, last_ids) == expected
