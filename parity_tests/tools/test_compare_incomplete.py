"""compare.py: calls and training steps that a trace declares and nobody can judge are no pass."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_parity.comparison.logprobs import given_targets, target_logprobs
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import LOGPROBS, Call
from reference_np.checkpoint import Checkpoint
from reference_np.ops import IGNORE

from ..backends.torch_model import save_numpy
from ..planted.port import Planted
from .comparing import CONFIG, QUICK, QUICK_CALLS, contents, write
from .traced_steps import CONFIG as TRAINED_CONFIG
from .traced_steps import N, traced, trained

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 300, (2, 24))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "trained.safetensors", TRAINED_CONFIG)


@pytest.mark.parametrize("left", [1, 3])
@pytest.mark.parametrize("shows", ["activations", "logits"])
def test_a_trace_that_lost_whole_calls_is_incomplete(
    ckpt: Path, run: Callable, report: Callable, tmp_path: Path, left: int, shows: str
) -> None:
    """A writer that stopped after so many calls, in a file that lists all of them."""
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, *QUICK)
    metadata, tensors = contents(path)
    inputs = ("tokens", "positions", "mask", "targets")
    kept = {
        name: value
        for name, value in tensors.items()
        if (int(name.split(".")[1]) < left and (shows == "activations" or "logits" in name))
        or name.endswith(inputs)
    }
    save_numpy(kept, path, metadata)
    code, out, _ = run(ckpt, "--against", path)
    assert code == 1
    last = out.splitlines()[-1]
    assert last.startswith("INCOMPLETE: ")
    assert f" in {left} of {QUICK_CALLS} calls within bounds; the closest is " in last
    lost = {1: "calls 1, 2 and 3", 3: "call 3"}[left]
    assert f"; not judged: {lost} of {QUICK_CALLS}" in last
    found = report(ckpt, "--against", path)
    assert found["verdict"]["compared"] == found["verdict"]["expected"] > 0
    assert found["verdict"]["unjudged"] == [f"{lost} of {QUICK_CALLS}"]


def test_outputs_of_a_call_that_is_not_listed_are_no_pass(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, *QUICK)
    metadata, tensors = contents(path)
    calls = json.loads(metadata["calls"])[:2]
    save_numpy(tensors, path, metadata | {"calls": json.dumps(calls)})
    code, out, _ = run(ckpt, "--against", path)
    assert code == 1
    assert out.splitlines()[-1].endswith("; not judged: calls 2 and 3, not among its calls")
    kept = {name: x for name, x in tensors.items() if int(name.split(".")[1]) < 2}
    save_numpy(kept, path, metadata | {"calls": json.dumps(calls)})
    assert run(ckpt, "--against", path)[0] == 0


def test_calls_of_which_nothing_can_be_judged_are_no_pass(
    ckpt: Path, report: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "trace.safetensors"
    calls = [
        Call("prompt", TOKENS),
        Call("step", TOKENS[:, :1], after=0),
        Call("no output", TOKENS),
        Call("declared", TOKENS, targets=np.full_like(TOKENS, IGNORE)),
    ]

    def fill(writer: TraceWriter) -> None:
        params = dict(Checkpoint(ckpt))
        logits = Planted("").logits(CONFIG, params, TOKENS, None, None)
        writer.add(0, LOGPROBS, target_logprobs(logits, given_targets(calls[0])))
        writer.add(1, LOGPROBS, np.zeros((2, 1), np.float32))

    write_trace(path, CONFIG, calls, "float32", fill)
    found = report(ckpt, "--against", path)
    assert found["coverage"] == [
        "log-probabilities",
        "not covered: its log-probabilities are of no target; write its targets",
        "not covered: the trace has no output of it",
        "not covered: all its targets are -100",
    ]
    line = found["verdict"]["line"]
    assert line.startswith("INCOMPLETE: 1 of 1 outputs in 1 of 4 calls within")
    assert "; not judged: calls 1 and 2 of 4; not seen: " in line
    assert found["verdict"]["unjudged"] == ["calls 1 and 2 of 4"]


def test_a_call_that_declares_no_target_may_show_nothing(
    ckpt: Path, report: Callable, tmp_path: Path
) -> None:
    """A prompt that fills the cache, of an engine that shows what it drew after it."""
    path, drawn = tmp_path / "trace.safetensors", RNG.integers(0, 300, (2, 1))
    calls = [
        Call("prompt", TOKENS, targets=np.full_like(TOKENS, IGNORE)),
        Call("step", TOKENS[:, :1], after=0, targets=drawn),
    ]
    params = dict(Checkpoint(ckpt))
    _, cache = Planted("").decode(CONFIG, params, TOKENS, None, None, None)
    logits, _ = Planted("").decode(CONFIG, params, TOKENS[:, :1], None, None, cache)

    def fill(writer: TraceWriter) -> None:
        writer.add(1, LOGPROBS, target_logprobs(logits, drawn))

    write_trace(path, CONFIG, calls, "float32", fill)
    found = report(ckpt, "--against", path)
    assert found["verdict"]["line"].startswith("PASS: 1 of 1 outputs in 1 of 2 calls within")
    assert found["verdict"]["unjudged"] == []


def without_moments(s: int, name: str) -> bool:
    return not name.startswith("exp_avg")


@pytest.mark.parametrize("lost", ["exp_avg.", "exp_avg_sq.", "exp_avg", "exp_avg.model.norm"])
def test_a_loss_is_judged_from_the_parameters_before_it_alone(
    path: Path, report: Callable, lost: str
) -> None:
    """And so are the gradients and their norm; what needs moments is said to be left."""
    values = [dict(found) for found in trained(path)]
    trace = traced(path, values, keeps=lambda s, name: not name.startswith(lost))
    found = report(path, "--against", trace)
    names = {row["name"] for row in found["training"]["rows"]}
    assert {"step 1 loss", "step 1 grad_norm", "step 1 grad model.norm.weight"} <= names
    assert not any(name.startswith(("step 1 update", "step 1 exp_avg")) for name in names)
    line = found["verdict"]["line"]
    assert line.startswith("INCOMPLETE: ")
    assert "; not judged: the updates of training step 1" in line
    for name, title in (("loss", "loss"), ("grad.model.norm.weight", "grad model.norm.weight")):
        wrong = [values[0], values[1] | {name: values[1][name] * np.float32(1.01)}]
        trace = traced(path, wrong, keeps=without_moments)
        found = report(path, "--against", trace, "--no-diagnose")
        diverging = [r["name"] for r in found["training"]["rows"] if r["status"] != "ok"]
        assert diverging == [f"step 1 {title}"]


def test_losses_and_parameters_alone_are_judged_in_every_step(path: Path, report: Callable) -> None:
    """The last step shows no parameters, which nothing after it needs."""
    trace = traced(
        path, trained(path), keeps=lambda s, n: n == "loss" or (n[:5] == "param" and not s)
    )
    found = report(path, "--against", trace)
    assert found["verdict"]["holds"], found["verdict"]["line"]
    names = [row["name"] for row in found["training"]["rows"]]
    assert names == ["step 0 loss", *(n for n in names if "update" in n), "step 1 loss"]
    assert found["verdict"]["unseen"] == [
        *("gradient norms", "gradients", f"{N} of {2 * N} updates", "moments")
    ]


def test_a_step_that_shows_nothing_is_no_pass(path: Path, report: Callable, run: Callable) -> None:
    trace = traced(path, trained(path), keeps=lambda s, name: s == 0)
    found = report(path, "--against", trace)
    assert "in 1 of 2 training steps within bounds" in found["verdict"]["line"]
    assert found["verdict"]["line"].startswith("INCOMPLETE: ")
    assert "; not judged: training step 1" in found["verdict"]["line"]
    assert "Not judged: step 1: the trace has no result to judge." in found["training"]["notes"]
    trace = traced(path, trained(path), keeps=lambda s, name: s == 1)
    last = run(path, "--against", trace)[1].splitlines()[-1]
    assert last.startswith(
        "FAIL: 0 of 0 quantities in 0 of 2 training steps compared; "
        "not judged: training step 1, training step 0; not seen: 1 of 2 losses,"
    )


def test_steps_in_low_precision_beside_calls_are_no_pass(
    path: Path, run: Callable, tmp_path: Path
) -> None:
    trace = tmp_path / "oracle.safetensors"
    argv = ("--grads", "--tokens", 16, "--steps", 0, "--trace", trace)
    assert run(path, *argv)[0] == 0
    metadata, tensors = contents(trace)
    save_numpy(tensors, trace, metadata | {"dtype": "bfloat16"})
    code, out, _ = run(path, "--against", trace)
    assert code == 1
    last = out.splitlines()[-1]
    assert last.startswith("INCOMPLETE: ")
    assert " quantities in 0 of 1 training steps within bounds; " in last
    assert last.endswith("; not judged: training step 0")
