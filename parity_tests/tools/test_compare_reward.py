"""compare.py --reward: a training step of a reward model on real pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_torch.model import pair_loss
from llama_torch.model.config import ModelConfig
from llama_torch.training import pair_objective, pair_source

from ..backends.torch_model import write_model
from ..support.pairs import sums, write_pairs
from ..support.reward_models import write_reward_model
from ..support.tokenizers import byte_level
from .comparing import named

CONFIG = ModelConfig(16, 2, 4, 2, 4, 24, 700, max_seq_len=200, tie_embeddings=True)
STRICT = ("--dtype", "float64")
LAYOUT = ["reward tokens", "reward lengths", "reward margins", "reward labels"]
Report = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("models") / "reward", "bytes", CONFIG)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [pair | {"chosen_safe": i % 2 == 0} for i, pair in enumerate(sums(8))]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


@pytest.mark.parametrize(
    "flags",
    [(), STRICT, ("--margin", "large", "--safety-loss", "0.5"), ("--against", "torch:float64")],
)
def test_a_step_agrees(model: Path, pairs: str, report: Report, flags: tuple[str, ...]) -> None:
    """Layout, every score, the loss, every gradient and both updates hold."""
    found = report(model, "--reward", pairs, *flags)
    assert found["verdict"]["holds"], found["verdict"]["line"]
    assert found["verdict"]["unseen"] == ["beta2 and the schedule (first step alone)"]
    names = [row["name"] for row in found["training"]["rows"]]
    assert names[:4] == LAYOUT
    assert sum(name.startswith("score of pair") for name in names) == 12
    assert {"loss", "grad score.weight", "whole step score.weight"} <= {*names}
    assert not any("lm_head" in name for name in names)
    assert found["training"]["notes"][0].startswith(f"6 pairs of {pairs} (")


def test_the_report_is_shown_on_a_terminal_and_as_a_page(
    model: Path, pairs: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    code, out, _ = run(model, "--reward", pairs, "--all", "--html", page)
    assert code == 0
    assert "a training step on 6 pairs" in out
    assert "score of pair 1, chosen" in out
    assert "score of pair 1, chosen" in page.read_text()


REAL_LOSSES, REAL_SCORES = pair_loss.pair_losses, pair_loss.scores_at
REAL_BACKWARD = pair_loss.backward_scores
REAL_SAFETY, REAL_COUNTS = pair_loss.safety_losses, pair_objective.PairLoss.counts
REAL_BATCH = pair_source.pair_batch


def margin_added(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Any:
    return REAL_LOSSES(chosen, rejected, -margins)


def margin_forgotten(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Any:
    return REAL_LOSSES(chosen, rejected, 0 * margins)


def read_early(hidden: Tensor, head: Tensor, last: Tensor) -> Tensor:
    return REAL_SCORES(hidden, head, last - 1)


def learnt_early(hidden: Tensor, head: Tensor, last: Tensor, d_scores: Tensor) -> None:
    REAL_BACKWARD(hidden, head, last - 1, d_scores)


def at_row_end(hidden: Tensor, last: Tensor) -> Tensor:
    return hidden[:, -1]


def safety_inverted(scores: Tensor, safe: Tensor) -> Any:
    return REAL_SAFETY(scores, ~safe)


def own_counts(self: pair_objective.PairLoss, batch: Any) -> Any:
    """Count the answers in place of the pairs: half the gradient."""
    pairs, labelled = REAL_COUNTS(self, batch)
    return 2 * pairs, labelled


def padded_left(windows: Tensor) -> Any:
    batch = REAL_BATCH(windows)
    width, tokens = batch.tokens.shape[1], batch.tokens.clone()
    for row, last in enumerate(batch.targets[:, 0].tolist()):
        tokens[row] = tokens[row].roll(width - 1 - last)
    targets = batch.targets.clone()
    targets[:, 0] = width - 1
    return batch._replace(tokens=tokens, targets=targets)


Planted = dict[tuple[Any, str], Any]  # (where, the name there): the fault
FAULTS: dict[str, tuple[Planted, list[str], str]] = {
    # the fault; the bug that is named; the first wrong row
    "margin added": (
        *({(pair_objective, "pair_losses"): margin_added}, ["margin_added"]),
        "loss",
    ),
    "no margin": (
        *({(pair_objective, "pair_losses"): margin_forgotten}, ["margin_forgotten"]),
        "loss",
    ),
    "score read early": (
        {
            (pair_objective, "scores_at"): read_early,
            (pair_objective, "backward_scores"): learnt_early,
        },
        *(["score_before_the_end"], "score of pair 1, chosen"),
    ),
    "row's end": ({(pair_loss, "last_hidden"): at_row_end}, [], "score of pair 1, rejected"),
    "safety inverted": ({(pair_objective, "safety_losses"): safety_inverted}, [], "loss"),
    "answers for pairs": ({(pair_objective.PairLoss, "counts"): own_counts}, [], "loss"),
    "padded left": ({(pair_source, "pair_batch"): padded_left}, [], "reward tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(
    fault: str, model: Path, pairs: str, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named where it is a known bug, and explains all that diverges."""
    planted, bugs, wrong = FAULTS[fault]
    for (place, name), function in planted.items():
        monkeypatch.setattr(place, name, function)
    found = report(model, "--reward", pairs, *STRICT, "--margin", "large", "--safety-loss", "0.5")
    assert not found["verdict"]["holds"]
    rows = found["training"]["rows"]
    assert next(row["name"] for row in rows if row["status"] != "ok") == wrong
    assert named(found["training"]) == ([bugs] if bugs else [])
    assert bugs == [] or found["training"]["unexplained"] == 0


def test_float32_finds_a_fault_of_one_weights_gradient(
    model: Path, pairs: str, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pair_loss.backward_scores

    def larger(hidden: Tensor, head: Tensor, last: Tensor, d_scores: Tensor) -> None:
        real(hidden, head, last, d_scores)
        head.grad = head.grad * torch.where(torch.arange(head.shape[1]) == 15, 1.01, 1.0)

    monkeypatch.setattr(pair_objective, "backward_scores", larger)
    found = report(model, "--reward", pairs)
    wrong = [row["name"] for row in found["training"]["rows"] if row["status"] != "ok"]
    assert wrong[0] == "grad score.weight"
    assert all(name.endswith("score.weight") for name in wrong)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--margin", "large"], "--margin is of a reward model; give --reward too"),
        (["--safety-loss", "1"], "--safety-loss is of a reward model; give --reward too"),
        (["--reward", "{pairs}", "--safety-loss", "-1"], "--safety-loss must be zero or positive"),
        (["--reward", "{pairs}", "--sft", "{pairs}"], "--sft: --reward compares a training step"),
        (["--reward", "{pairs}", "--trace", "t"], "--trace: --reward compares a training step"),
        (["--reward", "{pairs}", "--ids", "3"], "--ids: --reward has its own tokens"),
        (["--reward", "{pairs}", "--against", "hf"], "--against hf: --reward compares"),
        (["--reward", "{pairs}", "--against", "torch:bfloat16"], "compares llama_torch's trainer"),
        (["--reward", "{pairs}", "--dtype", "float16"], "--reward compares in float32 or float64"),
        (["--reward", "{pairs}.no"], "pairs.jsonl.no"),
        (["--reward", "{pairs}", "--tokens", "4"], "no pair has two conversations of 4 tokens"),
        (["--reward", "{pairs}", "--template", "none.jinja"], "none.jinja"),
        (["--reward", "{pairs}", "--json", "{pairs}"], "would overwrite an input"),
        ([], "is a reward model (score.weight is its head); give --reward PAIRS"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    argv: list[str], says: str, model: Path, pairs: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run(model, *(part.format(pairs=pairs) for part in argv))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


SOME = {"prompt": "Add 1 1", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("record", "flags", "says"),
    [
        (SOME | {"rejected": "2"}, (), "line 1: chosen and rejected are equal; remove the line"),
        (SOME | {"strength": "much"}, (), "line 1: strength is 'much', not one of"),
        (SOME, ("--safety-loss", 1), "--safety-loss: none of the 1 pair read of"),
        (None, (), "no pair"),
    ],
)
def test_pairs_that_cannot_be_learnt_from_are_one_line(
    record: dict[str, Any] | None,
    flags: tuple[object, ...],
    says: str,
    model: Path,
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("" if record is None else json.dumps(record) + "\n")
    code, out, err = run(model, "--reward", path, *flags)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_language_model_is_refused(
    pairs: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    write_model(tmp_path, CONFIG)
    byte_level(tmp_path)
    code, out, err = run(tmp_path, "--reward", pairs)
    assert (code, out) == (2, "")
    assert f"{tmp_path}: is no reward model, which has a head score.weight" in err
    assert err.count("\n") == 1


def test_a_pair_without_a_second_micro_batch_is_compared(
    model: Path, tmp_path: Path, report: Report
) -> None:
    found = report(model, "--reward", write_pairs(tmp_path / "one.jsonl", [SOME]), *STRICT)
    assert found["verdict"]["holds"], found["verdict"]["line"]
    assert found["training"]["notes"][0].startswith("1 pair of ")
