"""The check of a port's traces of the golden vectors passes right ports and names wrong ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference_np import grad, ops, optim
from reference_np.low_precision import round_to
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING

from ..support.oracle_inputs import transposed
from ..vectors.check import Verdict, check, exit_code, report
from ..vectors.results import Operations
from .vector_traces import CASES, MODELS, numpy_port, write_basic, write_case, write_traces

BASIC = [case for case in CASES.values() if case.basic]


def by_case(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.case: verdict for verdict in verdicts}


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    """Return a folder with right traces of the basic cases."""
    return write_basic(tmp_path / "traces")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_numpy_in_every_precision_passes_every_case(dtype: str, tmp_path: Path) -> None:
    write_traces(tmp_path, numpy_port(dtype), dtype)
    verdicts = check(tmp_path)
    wrong = [verdict for verdict in verdicts if verdict.status == "failed"]
    assert wrong == []
    passed = sum(verdict.status == "passed" for verdict in verdicts)
    trained = sum(bool(case.steps) for case in CASES.values())
    assert passed == len(CASES) - (trained if dtype.endswith("16") else 0)
    assert exit_code(verdicts) == 0


@pytest.mark.parametrize("name", ["rope_angles_float32", "kv_heads_tiled", "clip_by_value"])
def test_a_bug_fails_the_cases_that_say_so_and_no_other(name: str, tmp_path: Path) -> None:
    mutant = next(one for one in (*FORWARD, *TRAINING) if one.name == name)
    by = Operations(
        *(mutant.apply(part) for part in (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES))
    )
    write_traces(tmp_path, numpy_port("float64", by), "float64")
    verdicts = check(tmp_path)
    assert exit_code(verdicts) == 1
    for verdict in verdicts:
        if verdict.status == "failed":
            assert name in verdict.flags or verdict.share < 10
        else:
            assert name not in verdict.flags
    assert any(name in line for line in report(verdicts))


def test_angles_in_float32_pass_where_they_are_declared(tmp_path: Path) -> None:
    angles = next(one for one in FORWARD if one.name == "rope_angles_float32")
    write_traces(tmp_path, numpy_port("float32", Operations(angles.apply(ops))), "float32")
    undeclared, declared = check(tmp_path), check(tmp_path, float32_angles=True)
    failed = {verdict.case for verdict in undeclared if verdict.status == "failed"}
    assert {"positions-far", "positions-last"} <= failed
    assert [verdict.line() for verdict in declared if verdict.status == "failed"] == []


def test_a_port_may_leave_out_what_is_not_basic(basic: Path) -> None:
    verdicts = check(basic)
    assert exit_code(verdicts) == 0
    assert {v.status for v in verdicts} == {"passed", "not covered"}
    assert report(verdicts)[-1] == (
        f"{len(CASES)} cases: 0 failed, {len(CASES) - len(BASIC)} not covered, {len(BASIC)} passed"
    )
    (basic / f"{BASIC[0].name}.safetensors").unlink()
    verdict = by_case(check(basic))[BASIC[0].name]
    assert (verdict.status, verdict.reason) == ("failed", "no trace")


def basic_failures(folder: Path, change: Any) -> set[str]:
    """Return the basic cases that fail where a harness changes tokens and parameters."""
    for case in BASIC:
        model, call = MODELS[case.model], case.calls[0]
        tokens, params = change(call.tokens, dict(model.params))
        other = replace(case, calls=(call._replace(tokens=tokens),))
        with np.errstate(all="ignore"):
            results = numpy_port("float32")(other, model._replace(params=params))
        assert results is not None
        # It believes that it ran the case's own tokens.
        results = {name: value.astype(np.float32) for name, value in results.items()}
        write_case(folder, case, results, "float32")
    return {v.case for v in check(folder) if v.status == "failed"}


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.mark.parametrize("part", MATRICES)
def test_a_transposed_matrix_fails_a_basic_case(part: str, basic: Path) -> None:
    failed = basic_failures(basic, lambda t, p: (t, transposed(p, part, square_only=True)))
    assert failed
    assert not failed & {"basic-one-token", "basic-order"}  # of identities


@pytest.mark.parametrize(
    ("change", "case"),
    [
        (lambda tokens, params: (tokens[:, ::-1], params), "basic-order"),
        (lambda tokens, params: (tokens[::-1], params), "basic-rows"),
        (lambda tokens, params: (np.maximum(tokens - 1, 0), params), "basic-last-token"),
        (
            lambda tokens, params: (
                tokens,
                {n: round_to(p, "bfloat16") for n, p in params.items()},
            ),
            "basic-dtype",
        ),
    ],
    ids=["order", "rows", "ids", "dtype"],
)
def test_a_broken_harness_fails_its_basic_case(change: Any, case: str, basic: Path) -> None:
    assert basic_failures(basic, lambda tokens, params: (tokens, params)) == set()
    assert case in basic_failures(basic, change)
