"""A trace of a golden vector is one of the case's own inputs; a failure tells other settings."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..vectors.check import Verdict
from .vector_traces import CASES, MODELS, right, verdict_on

Judge = Callable[..., Verdict]
ONE, TRAINING = "causal-gqa", "training-everything"


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Return the function that writes a trace of a case with results and returns the verdict."""
    return partial(verdict_on, tmp_path)


def changed_input(name: str, **given: Any) -> tuple[Any, ...]:
    """Return the calls of a case, the first with another input."""
    first, *others = CASES[name].calls
    return (first._replace(**given), *others)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (ONE, {"tokens": np.array([[1, 2, 3, 4, 5]])}, "call 0 has other tokens"),
        (ONE, {"tokens": np.array([[1, 2]])}, "call 0 has other tokens"),
        (ONE, {"positions": np.arange(1, 6)[None]}, "call 0 has other positions"),
        (ONE, {"mask": np.ones((1, 5, 5), bool)}, "call 0 has another mask"),
        ("positions-gaps", {"positions": np.arange(4)[None]}, "call 0 has other positions"),
        ("mask-all", {"mask": np.tri(4, dtype=bool)[None]}, "call 0 has another mask"),
        ("logprobs-answer", {"targets": np.ones((2, 6), int)}, "call 0 has other targets"),
    ],
)
def test_other_inputs_are_no_run_of_the_case(
    name: str, given: Any, words: str, judge: Judge
) -> None:
    verdict = judge(name, right(name), calls=changed_input(name, **given))
    assert (verdict.status, verdict.reason) == ("failed", f"{words}: run the case's own inputs")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (ONE, {"positions": np.arange(5)[None], "mask": np.tri(5, dtype=bool)[None]}),
        ("positions-gaps", {"positions": None}),
        ("mask-window", {"mask": None}),
        ("padding-right", {"mask": np.tile(np.tri(6, dtype=bool), (3, 1, 1)), "positions": None}),
        ("logprobs-answer", {"targets": None}),
    ],
)
def test_inputs_that_say_the_same_or_nothing_pass(name: str, given: Any, judge: Judge) -> None:
    verdict = judge(name, right(name), calls=changed_input(name, **given))
    assert verdict.status == "passed", verdict.reason


def test_other_micro_batches_are_no_run_of_the_case(judge: Judge) -> None:
    case = CASES["training-micro-batches"]
    [step] = case.steps
    first, second = step.batches
    for batches, words in (
        ([first], "step 0 has 1 micro-batches, not 2"),
        ([second, first], "step 0 has other tokens"),
        ([first._replace(targets=second.targets[:1, :1] + 0 * first.targets), second], "targets"),
        ([first._replace(mask=np.ones((2, 4, 4), bool)), second], "step 0 has another mask"),
    ):
        verdict = judge(case.name, right(case.name), steps=[step._replace(batches=batches)])
        assert verdict.status == "failed"
        assert words in verdict.reason


def test_a_failure_tells_another_config_or_other_hyperparameters(judge: Judge) -> None:
    results = right(ONE)
    other = replace(MODELS[CASES[ONE].model].config, rope_theta=500.0)
    assert judge(ONE, results, config=other).status == "passed"  # its results are right
    results["call.0.logits"] *= 1.01
    verdict = judge(ONE, results, config=other)
    assert verdict.reason.endswith("; in the trace's config: rope_theta 500.0, not 10000.0")
    results, hyper = right(TRAINING), CASES[TRAINING].hyperparameters
    assert hyper is not None
    name = "step.0.param.model.norm.weight"
    results[name] = results[name] + 1.0
    verdict = judge(TRAINING, results, hyper=replace(hyper, lr=0.5))
    assert verdict.reason.endswith("; in the trace's hyperparameters: lr 0.5, not 0.0625")
