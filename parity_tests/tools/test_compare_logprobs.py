"""compare.py and traces of log-probabilities alone, as engines that generate and train show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison.engine_report import logprob_entry
from llama_parity.comparison.logprobs import (
    given_targets,
    logprob_bound,
    softmax_bound,
    target_logprobs,
)
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import LOGPROBS, Call
from reference_np.checkpoint import Checkpoint
from reference_np.low_precision import round_to
from reference_np.ops import IGNORE
from reference_np.tolerances import Errors

from ..planted.port import Planted
from .comparing import CONFIG, named

RNG = np.random.default_rng(0)
LEFT = np.tril(np.ones((2, 24, 24), bool))
LEFT[1, :, :7] = False
LEFT |= np.eye(24, dtype=bool)
POSITIONS = np.stack([np.arange(24), np.maximum(np.arange(24) - 7, 0)])
TOKENS = RNG.integers(0, 300, (2, 24))
TOKENS[1, :7] = 0
TARGETS = np.where(RNG.random((2, 24)) < 0.3, IGNORE, RNG.integers(0, 300, (2, 24)))
CALLS = [
    Call("plain", TOKENS),
    Call("padded", TOKENS, POSITIONS, LEFT),
    Call("given targets", TOKENS[:1], targets=TARGETS[:1]),
]
Edit = Callable[[np.ndarray], Any]


def engine(
    path: Path,
    ckpt: Path,
    bug: str = "",
    dtype: str = "float32",
    edit: Edit = lambda x: x,
    shows: str = "log-probabilities",
) -> Path:
    """Write the trace of a port in torch, with a bug, whose log-probabilities ``edit`` changes."""
    port, params = Planted(bug), dict(Checkpoint(ckpt, dtype))

    def fill(writer: TraceWriter) -> None:
        for c, call in enumerate(CALLS):
            logits = port.logits(CONFIG, params, call.tokens, call.positions, call.mask)
            if shows != "log-probabilities":
                writer.add(c, "logits", logits)
            if shows != "logits":
                value = edit(target_logprobs(logits, given_targets(call)))
                writer.add(c, LOGPROBS, np.asarray(value, dtype))

    write_trace(path, CONFIG, CALLS, dtype, fill)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shows", ["log-probabilities", "logits", "both"])
def test_honest_log_probabilities_pass_and_what_is_not_seen_is_said(
    ckpt: Path, run: Callable, tmp_path: Path, dtype: str, shows: str
) -> None:
    path = engine(tmp_path / "trace.safetensors", ckpt, dtype=dtype, shows=shows)
    code, out, _ = run(ckpt, "--against", path)
    assert code == 0, out
    last = out.splitlines()[-1]
    assert last.startswith("PASS: ")
    if shows == "log-probabilities":
        assert "3 of 3 calls show log-probabilities of targets alone" in out
        assert last.startswith("PASS: 3 of 3 outputs within bounds")
        assert last.endswith("not seen: activations, the probabilities of other tokens")
    else:
        assert last.endswith("not seen: activations")
    if shows != "logits":
        n = 2 * 23 + (2 * 23 - 7) + int((TARGETS[0] != IGNORE).sum())
        assert sum(int(line.split(": ")[1].split()[0]) for line in lines_of(out)) == n


def lines_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("log-probabilities of ")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "bug", ["rope_interleaved", "k_permuted_as_q", "kv_heads_tiled", "rope_theta_ignored"]
)
def test_a_bug_is_named_by_log_probabilities_alone(
    ckpt: Path, report: Callable, tmp_path: Path, bug: str, dtype: str
) -> None:
    path = engine(tmp_path / "trace.safetensors", ckpt, bug, dtype)
    found = report(ckpt, "--against", path)
    assert not found["verdict"]["holds"]
    assert bug in [name for names in named(found) for name in names]
    assert found["unexplained"] == 0
    assert "the whole model, of which nothing else is shown" in found["verdict"]["line"]


def test_logits_in_low_precision_fail(ckpt: Path, report: Callable, tmp_path: Path) -> None:
    """An engine that says float32 and rounds its log-probabilities, or their inputs, to less."""
    path = tmp_path / "trace.safetensors"
    for dtype in ("bfloat16", "float16"):
        engine(path, ckpt, edit=lambda x, to=dtype: round_to(x, to))
        found = report(ckpt, "--against", path, "--no-diagnose")
        assert {row["status"] for row in found["rows"]} == {"diverges"}


def test_a_wrong_log_softmax_of_right_logits_is_located(
    ckpt: Path, report: Callable, tmp_path: Path
) -> None:
    """Divided by a temperature after the fact: the logits hold."""
    edit: Edit = lambda x: x * np.float32(1.01)  # noqa: E731
    path = engine(tmp_path / "trace.safetensors", ckpt, edit=edit, shows="both")
    found = report(ckpt, "--against", path)
    status = {(row["name"], row["status"]) for row in found["rows"]}
    assert status == {("logits", "ok"), ("logits.kl", "ok"), (LOGPROBS, "diverges")}
    assert found["unexplained"] == found["diverging"] == 3
    assert "the log-probabilities of the targets (log-softmax)" in found["verdict"]["line"]


def shifted(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1, axis=1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: -x, "are their negatives, the losses of the tokens: write log p"),
        (np.exp, "are probabilities: write their natural logarithm"),
        (lambda x: x / np.log(2), "are logarithms of base 2: multiply them by log(2)"),
        (lambda x: x / np.log(10), "are logarithms of base 10: multiply them by log(10)"),
        (shifted, "are each one position late: a target follows its position"),
        (lambda x: x + 0.1, ""),
        (lambda x: x * np.nan, ""),
    ],
)
def test_what_is_written_in_place_of_log_probabilities_is_named(
    ckpt: Path, report: Callable, tmp_path: Path, edit: Edit, message: str
) -> None:
    path = engine(tmp_path / "trace.safetensors", ckpt, edit=edit)
    found = report(ckpt, "--against", path, "--no-diagnose")
    assert not found["verdict"]["holds"]
    expected = f"{LOGPROBS} of plain {message}" if message else ""
    assert found["warnings"].count(LOGPROBS) == bool(message)
    assert expected in found["warnings"]


def test_nan_counts_where_there_is_a_target_and_nowhere_else(
    ckpt: Path, report: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "trace.safetensors"
    for at, status in (((slice(None), -1), "ok"), ((0, 3), "not finite")):

        def edit(x: np.ndarray, at: Any = at) -> np.ndarray:
            x = x.copy()
            x[at] = np.nan
            return x

        engine(path, ckpt, edit=lambda x, edit=edit: edit(x) if len(x) == 2 else x)
        found = report(ckpt, "--against", path, "--no-diagnose")
        assert [row["status"] for row in found["rows"]] == [status, status, "ok"]


def test_a_wrong_shape_fails(ckpt: Path, report: Callable, tmp_path: Path) -> None:
    path = engine(tmp_path / "trace.safetensors", ckpt, edit=lambda x: x[:, 1:])
    found = report(ckpt, "--against", path, "--no-diagnose")
    assert {row["status"] for row in found["rows"]} == {"misshapen"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_bounds_hold_for_logits_at_their_own_bound(dtype: str) -> None:
    """The worst case: the target's logit up, all others down, by all that they may."""
    logits = RNG.standard_normal((2, 5, 50)) * 8
    targets = RNG.integers(0, 50, (2, 5))
    bound = Errors(1e-3, 1e-3, 1e-3)
    moved = logits - 1e-3 * np.abs(logits).max()
    np.put_along_axis(moved, targets[..., None], moved.max() + 1, axis=-1)
    at_target = np.take_along_axis(logits, targets[..., None], -1) + 1e-3 * np.abs(logits).max()
    np.put_along_axis(moved, targets[..., None], at_target, axis=-1)
    error = np.abs(target_logprobs(moved, targets) - target_logprobs(logits, targets))
    own = softmax_bound(logits, targets, dtype)
    limit = logprob_bound(logits, own, bound)
    assert (error <= limit).all()
    assert (limit < 3e-3 * np.abs(logits).max() + own).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_a_float32_log_softmax_in_a_loop_is_within_its_bound(scale: float) -> None:
    logits = (RNG.standard_normal((4, 8, 4096)) * scale).astype(np.float32)
    targets = RNG.integers(0, 4096, (4, 8))
    exact = target_logprobs(logits.astype(np.float64), targets)
    top = logits.max(axis=-1, keepdims=True)
    looped = np.cumsum(np.exp(logits - top), axis=-1)[..., -1:]
    found = np.take_along_axis(logits - (top + np.log(looped)), targets[..., None], -1)[..., 0]
    bound = softmax_bound(logits, targets, "float32")
    assert (np.abs(found - exact) <= bound).all()
    assert bound.max() < 1e-3


def test_two_engines_are_compared_with_each_other(
    ckpt: Path, run: Callable, report: Callable, tmp_path: Path
) -> None:
    """The one that trains is right, the one that generates has a bug; logits will do as well."""
    rollout = engine(tmp_path / "rollout.safetensors", ckpt, "rope_theta_ignored")
    train = engine(tmp_path / "train.safetensors", ckpt, shows="logits")
    found = report(ckpt, "--against", rollout, "--beside", train, "--no-diagnose")
    assert not found["verdict"]["holds"]
    assert found["engines"]["beside"] == str(train)
    assert [entry["name"] for entry in found["engines"]["calls"]] == [c.name for c in CALLS]
    for entry, of_oracle in zip(found["engines"]["calls"], found["logprobs"], strict=True):
        assert entry["tokens"] == of_oracle["tokens"]
        assert entry["largest"] == pytest.approx(of_oracle["largest"], rel=1e-3)
        assert (entry["row"], entry["position"]) == (of_oracle["row"], of_oracle["position"])
        assert 0 < entry["mean_abs"] < entry["largest"]
        assert entry["k3"] > 0
    code, out, _ = run(ckpt, "--against", train, "--beside", rollout)
    assert code == 0  # the verdict is of the first alone
    assert f"log-probabilities of plain from those of {rollout}: 46 tokens differ by" in out


def test_k3_estimates_the_divergence(tmp_path: Path) -> None:
    """Of tokens drawn from the first engine; it is never negative."""
    p, q = (x / x.sum() for x in RNG.random((2, 50)) + 0.05)
    drawn = RNG.choice(50, size=(1, 100_000), p=p)
    call = Call("drawn", drawn, targets=drawn)
    entry = logprob_entry(0, call, np.log(p)[drawn], np.log(q)[drawn])
    assert entry is not None
    assert entry["k3"] == pytest.approx(float(np.sum(p * np.log(p / q))), rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other tokens", "not of the calls of"),
        ("other targets", "not of the calls of"),
        ("fewer calls", "not of the calls of"),
        ("NaN", "no call has log-probabilities, finite ones, in both traces"),
        ("none", "no call has log-probabilities, finite ones, in both traces"),
        ("no trace", "not a complete safetensors file"),
        ("no first", "needs a trace in --against too"),
    ],
)
def test_a_second_trace_that_does_not_fit_is_one_line(
    ckpt: Path, run: Callable, tmp_path: Path, change: str, message: str
) -> None:
    first = engine(tmp_path / "a.safetensors", ckpt)
    calls, value = list(CALLS), np.zeros((2, 24), np.float32)
    if change == "other tokens":
        calls[0] = Call("plain", (TOKENS + 1) % 300)
    elif change == "other targets":
        calls[0] = Call("plain", TOKENS, targets=TARGETS)
    elif change == "fewer calls":
        calls = calls[:1]
    elif change == "NaN":
        value = value * np.nan
    name = "embed" if change == "none" else LOGPROBS
    second = tmp_path / "b.safetensors"
    write_trace(second, CONFIG, calls, "float32", lambda writer: writer.add(0, name, value))
    if change == "no trace":
        second.write_bytes(b"none")
    against = "torch" if change == "no first" else first
    code, out, err = run(ckpt, "--against", against, "--beside", second)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
