"""A trace of a golden vector passes where it shows what the case asks for, and shows it right."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference_np.ops import IGNORE

from ..vectors.check import Verdict, check
from .vector_traces import CASES, right, verdict_on, write_basic

Results = dict[str, Any]
Judge = Callable[..., Verdict]
ONE = "causal-gqa"


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Return the function that writes a trace of a case with results and returns the verdict."""
    return partial(verdict_on, tmp_path)


def test_logits_alone_are_enough(judge: Judge) -> None:
    verdict = judge(ONE, {"call.0.logits": right(ONE)["call.0.logits"]}, "float32")
    assert verdict.status == "passed"
    assert verdict.reason.endswith("1 of 18 tensors")


def wrong_shape(results: Results) -> None:
    results["call.0.logits"] = results["call.0.logits"][..., :-1]


def last_token_alone(results: Results) -> None:
    results["call.0.logits"] = results["call.0.logits"][:, -1:]


def not_a_number(results: Results) -> None:
    results["call.0.norm"][0, 0, 0] = np.nan


def infinite(results: Results) -> None:
    results["call.0.layers.0.q"][0, 0, 0, 0] = -np.inf


def largest_numbers(results: Results) -> None:
    results["call.0.norm"][0] = -np.finfo(np.float64).max


def no_logits(results: Results) -> None:
    del results["call.0.logits"]


def other_outputs(results: Results) -> None:
    """Of a case without targets log-probabilities are not compared."""
    del results["call.0.logits"]
    results["call.0.target_logprobs"] = np.zeros((1, 5))


def integers(results: Results) -> None:
    results["call.0.logits"] = results["call.0.logits"].astype(np.int64)


def slightly_off(results: Results) -> None:
    results["call.0.logits"][0, 0, 0] += 1e-8


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_shape, "call.0.logits has the shape (1, 5, 31), not (1, 5, 32)"),
        (last_token_alone, "call.0.logits has the shape (1, 1, 32), not (1, 5, 32)"),
        (not_a_number, "call.0.norm at inf of its bound"),
        (infinite, "call.0.layers.0.q at inf of its bound"),
        (largest_numbers, "call.0.norm at "),
        (no_logits, "call.0.logits is missing"),
        (other_outputs, "call.0.logits is missing"),
        (integers, "call.0.logits is stored as I64, not as F64, F32, F16, BF16"),
        (slightly_off, "call.0.logits at "),
    ],
)
def test_a_wrong_trace_fails_with_its_reason(spoil: Any, words: str, judge: Judge) -> None:
    results = right(ONE)
    assert judge(ONE, results).status == "passed"
    spoil(results)
    verdict = judge(ONE, results)
    assert verdict.status == "failed"
    assert words in verdict.line()


@pytest.mark.parametrize("name", [ONE, "basic-order"])
def test_a_trace_without_results_fails(name: str, judge: Judge) -> None:
    verdict = judge(name, {})
    assert (verdict.status, verdict.reason) == ("failed", "call.0.logits is missing")


def test_what_overflows_in_float16_fails(judge: Judge) -> None:
    results = {name: value.astype(np.float32) for name, value in right(ONE).items()}
    assert judge(ONE, results, "float16").status == "passed"
    results["call.0.layers.0.gate"] *= np.float32(1e6)
    with np.errstate(over="ignore"):
        results["call.0.layers.0.gate"] = results["call.0.layers.0.gate"].astype("f2")
    verdict = judge(ONE, results, "float16")
    assert (verdict.status, verdict.share) == ("failed", np.inf)


def test_a_file_that_is_no_trace_fails_its_case_and_hides_no_other(tmp_path: Path) -> None:
    traces = write_basic(tmp_path / "traces")
    (traces / "basic-order.safetensors").write_bytes(b"x" * 20)
    path = traces / "basic-rows.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype": "float64"', b'"dtype": "float63"'))
    found = {verdict.case: verdict for verdict in check(traces) if verdict.status == "failed"}
    assert found.keys() == {"basic-order", "basic-rows"}
    assert "not a complete safetensors file" in found["basic-order"].reason
    assert "dtype 'float63' is not one of" in found["basic-rows"].reason


def test_padding_is_not_judged(judge: Judge) -> None:
    name = "padding-left"
    results = right(name)
    for value in results.values():
        value[0, :3] = np.nan
    assert judge(name, results).status == "passed"
    results["call.0.logits"][0, 3] += 1.0
    assert judge(name, results).status == "failed"


@pytest.mark.parametrize("name", ["logprobs", "logprobs-answer"])
@pytest.mark.parametrize("written", [np.nan, -100.0, -np.inf, 0.0])
def test_log_probabilities_of_no_target_are_not_judged(
    name: str, written: float, judge: Judge
) -> None:
    case, key = CASES[name], "call.0.target_logprobs"
    results = {key: right(name)[key]}
    targets = case.calls[0].targets
    assert targets is not None
    results[key][targets == IGNORE] = written
    assert judge(name, results).status == "passed"
    results[key][0, 3] += 0.01  # of a target
    assert targets[0, 3] != IGNORE
    assert judge(name, results).status == "failed"


TRAINING = "training-everything"  # two steps
MOMENTS = ("exp_avg", "exp_avg_sq")


def without(results: Results, *kinds: str) -> Results:
    """Return the results but for some kinds: "grad" or "param"."""
    return {name: value for name, value in results.items() if name.split(".")[2] not in kinds}


def test_losses_alone_do_not_cover_a_training_case(judge: Judge) -> None:
    results = right(TRAINING)
    assert judge(TRAINING, without(results, *MOMENTS, "grad_norm")).status == "passed"
    for kinds, words in (
        (("grad", "param"), "the trace shows no gradients and no updated parameters"),
        (("grad",), "the trace shows no gradients"),
        (("param",), "the trace shows no updated parameters"),
    ):
        verdict = judge(TRAINING, without(results, *kinds, *MOMENTS))
        assert (verdict.status, verdict.reason) == ("not covered", words)
    gradients = "training-gradients-trained"
    assert judge(gradients, without(right(gradients), "grad")).status == "not covered"


def test_a_wrong_loss_fails_though_its_trace_shows_nothing_else(judge: Judge) -> None:
    results = without(right(TRAINING), "grad", "param", *MOMENTS)
    results["step.1.loss"] = results["step.1.loss"] + 1e-6
    verdict = judge(TRAINING, results)
    assert verdict.status == "failed"
    assert verdict.reason.startswith("step.1.loss at ")


@pytest.mark.parametrize(
    "missing",
    [
        "step.1.grad.model.norm.weight",
        "step.0.param.model.layers.0.mlp.up_proj.weight",
        "step.1.loss",
    ],
)
def test_a_part_of_what_a_training_case_needs_is_missed(missing: str, judge: Judge) -> None:
    results = right(TRAINING)
    del results[missing]
    verdict = judge(TRAINING, results)
    assert (verdict.status, verdict.reason) == ("failed", f"{missing} is missing")
    # Where the other kind is not shown at all, too.
    other = "param" if ".grad." in missing else "grad"
    assert judge(TRAINING, without(results, other)).status == "failed"


def test_training_is_not_judged_in_16_bits(judge: Judge) -> None:
    results = {name: value.astype(np.float32) for name, value in right(TRAINING).items()}
    verdict = judge(TRAINING, results, "bfloat16")
    assert (verdict.status, verdict.reason) == ("not covered", "not judged in bfloat16")


def test_a_wrong_shape_of_a_gradient_fails_its_case(judge: Judge) -> None:
    results = right(TRAINING)
    name = "step.0.grad.model.layers.0.mlp.up_proj.weight"
    results[name] = results[name].T
    results["step.0.loss"] = results["step.0.loss"].reshape(1)  # the same number
    verdict = judge(TRAINING, results)
    assert verdict.status == "failed"
    assert f"{name} must be [16, 16]" not in verdict.reason  # square: by its numbers
    results[name] = results[name][:-1]
    assert f"{name} must be [16, 16], got [15, 16]" in judge(TRAINING, results).reason


def test_each_call_is_required(judge: Judge) -> None:
    name = "decode-steps"
    results = right(name)
    del results["call.2.logits"]
    verdict = judge(name, results)
    assert (verdict.status, verdict.reason) == ("failed", "call.2.logits is missing")
    calls = CASES[name].calls
    fewer = {key: value for key, value in right(name).items() if not key.startswith("call.3")}
    verdict = judge(name, fewer, calls=calls[:-1])
    assert verdict.reason.startswith("it has 3 calls and 0 steps, not 4 and 0: run the case's own")
    more = right(name) | {
        f"call.4.{key[7:]}": v for key, v in right(name).items() if "call.0" in key
    }
    assert judge(name, more, calls=(*calls, calls[0])).reason.startswith("it has 5 calls")
    forked = (*calls[:-1], calls[-1]._replace(after=0))
    assert judge(name, right(name), calls=forked).reason.startswith("call 3 continues another call")


def test_names_that_are_in_no_table_are_not_looked_at(judge: Judge, tmp_path: Path) -> None:
    assert judge(ONE, right(ONE)).status == "passed"
    path = tmp_path / f"{ONE}.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["call.9.logits"] = header.pop("call.0.logits")
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(content[:8] + text + content[8 + length :])
    verdict = next(one for one in check(tmp_path) if one.case == ONE)
    assert (verdict.status, verdict.reason) == ("failed", "call.0.logits is missing")
