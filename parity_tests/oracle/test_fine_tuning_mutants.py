"""Each known bug of fine-tuning is told from the oracle by many times the tolerance."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reference_np.fine_tuning_mutants import FINE_TUNING
from reference_np.masked import join_moments, moments
from reference_np.mutants import Mutant
from reference_np.ops import IGNORE
from reference_np.sft import sft_labels

from ..plugins.backend_option import pytest_ignore_collect
from ..support.documents import ROOT
from ..support.fine_tuning import TOLERANCE, distance
from ..support.fine_tuning_cases import CASES, LAYOUTS, REFERENCE, answers_of, as_tuple

pytestmark = [pytest.mark.numeric, pytest.mark.under_mutants]

GOAL = 10.0  # error / tolerance that every mutant must reach
FLOAT32 = 1e-5  # the tolerance of outputs in float32, of some roundings of 6e-8
Run = Callable[[Any], Any]  # from the operations to their outputs

END = 2
TALKS = (
    [([1, 5, 6], False), ([4, END], True), ([5, 3], False), ([6, 5, END], True)],
    [([3, 3], False), ([END], True)],
)


def labels(talk: Any, o: Any) -> Any:
    return o.sft_labels(talk)


def dialogue(o: Any) -> Any:
    turns = [((1, 4), (5, END)), ((3,), (6, END)), ((4, 4), (END,))]
    return sft_labels(o.gatt_dialogue((7, 7), turns))


def packed(o: Any) -> Any:
    return tuple(o.pack([sft_labels(talk) for talk in TALKS]))


def pairs(o: Any) -> Any:
    chosen, rejected = np.random.default_rng(0).standard_normal((2, 4))
    return o.pair_loss(chosen, rejected, np.array([3.0, 2.0, 1.0, 0.0]), 6)


def combined(o: Any) -> Any:
    helpful, safe = 2 * np.random.default_rng(0).standard_normal((2, 12))
    return o.combined_score(helpful, safe, np.arange(12) % 4 == 0)


def whitened(seed: int, o: Any) -> Any:
    """Return what two processes have, each with padding, of the moments of both."""
    batches = [answers_of([2, 4], "right", seed + i).batch(np.nan) for i in range(2)]
    joint = join_moments([moments(x.values, x.mask) for x in batches])
    return tuple(o.whiten(x.values, x.mask, joint=joint) for x in batches)


def groups(seed: int, o: Any) -> Any:
    """Return advantages in float32 of rewards that are large beside their differences."""
    rng = np.random.default_rng(seed)
    rewards = (1000 + rng.integers(0, 4, (3, 6)) / 4).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [5], [3]])
    return o.group_advantage(rewards, mask, leave_one_out=True)


def nothing_learnt(o: Any) -> Any:
    """Return the loss of a micro-batch without a learnt token, of a step that has some."""
    return o.token_loss(np.ones((1, 3, 7)), np.full((1, 3), IGNORE), 11)


OTHERS: dict[str, list[Run]] = {
    "token_loss": [nothing_learnt],
    "sft_labels": [partial(labels, talk) for talk in TALKS],
    "gatt_dialogue": [dialogue],
    "pack": [packed],
    "pair_loss": [pairs],
    "combined_score": [combined],
    "whiten": [partial(whitened, seed) for seed in range(3)],
    "group_advantage": [partial(groups, seed) for seed in range(3)],
}


def runs(operation: str) -> Iterator[Run]:
    """Yield what an operation is run on: answers in every layout, also one without a token."""
    yield from OTHERS.get(operation, ())
    for name in CASES:
        if name.split()[0] != operation:
            continue
        for seed, layout in enumerate(LAYOUTS):
            lengths = [3, 1, 5] if operation == "score_at" else [3, 0, 5]
            for filler in (np.nan, 0.5):
                batch = answers_of(lengths, layout, seed).batch(filler)
                yield partial(
                    lambda o, name, batch: CASES[name](o, batch, 11), name=name, batch=batch
                )


def margin(mutant: Mutant) -> float:
    """Return the largest error / tolerance of a mutant, over all outputs of its operation."""
    wrong = mutant.apply(REFERENCE)
    found = []
    for run in runs(mutant.operation):
        with np.errstate(all="ignore"):
            outputs = as_tuple(run(wrong))
        for own, right in zip(outputs, as_tuple(run(REFERENCE)), strict=True):
            found.append(distance(own, right) / (FLOAT32 if right.dtype == "f4" else TOLERANCE))
    return max(found)


@pytest.mark.parametrize("mutant", FINE_TUNING, ids=lambda mutant: mutant.name)
def test_a_fine_tuning_mutant_is_killed(mutant: Mutant) -> None:
    times = margin(mutant)
    assert times >= GOAL, f"{mutant.name}: {times:.1e} times the tolerance"


@pytest.mark.parametrize("mutant", FINE_TUNING, ids=lambda mutant: mutant.name)
def test_a_mutant_replaces_an_operation_that_the_oracle_has(mutant: Mutant) -> None:
    honest = mutant._replace(replacement=getattr(REFERENCE, mutant.operation))
    assert margin(honest) == 0


def table() -> list[str]:
    """Return the rows of the page's table of known bugs."""
    return [f"| `{m.name}` | `{m.operation}` | {m.sentence} | {m.citation} |" for m in FINE_TUNING]


def test_the_page_lists_every_bug() -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    found = page.partition("## Known bugs")[2].splitlines()
    listed = [line for line in found if line.startswith("| `")]
    assert listed == table(), "\n".join(table())
    assert f"The {len(FINE_TUNING)} bugs of " in page


@pytest.mark.parametrize("asked_for", [None, ["torch"]])
def test_these_tests_run_with_mutants_and_not_with_a_backend(
    asked_for: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARITY_BACKEND", raising=False)
    options = {"backend": asked_for, "mutants": asked_for is None}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    here, other = Path(__file__), Path(__file__).with_name("test_sft.py")
    assert pytest_ignore_collect(here, config) is (None if asked_for is None else True)
    assert pytest_ignore_collect(other, config) is True


def test_names_are_unique_and_sentences_are_one() -> None:
    assert len({m.name for m in FINE_TUNING}) == len(FINE_TUNING) >= 25
    assert all(m.citation and not m.sentence.endswith(".") for m in FINE_TUNING)
