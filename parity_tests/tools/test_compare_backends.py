"""compare.py: backends that offer a part of the protocol, overwrite their inputs, or fail."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference_np.backend import Backend
from reference_np.limits import Limits

from ..conformance.oracle import Oracle
from ..planted.port import Planted
from ..suite.toy_ports import Engine
from .comparing import CONFIG, QUICK, Offering, named, write


def test_a_trace_without_decoding(ckpt: Path, report: Callable, offer: Callable) -> None:
    for bug in ("", "silu_on_up"):
        spec = offer(Offering(Planted(bug), "logits", "trace"))
        found = report(ckpt, "--against", spec, *QUICK)
        assert found["verdict"]["holds"] == (not bug)
        assert named(found) == ([[bug]] if bug else [])


@pytest.mark.parametrize("which", [2, 3, 4])
def test_a_backend_that_spoils_its_inputs_fools_nobody(
    ckpt: Path, report: Callable, offer: Callable, which: int
) -> None:
    class Spoils(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            if arguments[which] is not None:
                arguments[which][...] = 1
            return super().traced_decode(*arguments)

    found = report(ckpt, "--against", offer(Spoils()), *QUICK, "--no-diagnose")
    assert not found["verdict"]["holds"]


def test_nothing_covered_is_not_a_pass(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Refuses:
        dtypes = ("float32",)

        def logits(self, *arguments: Any) -> Any:
            raise NotImplementedError("not today")

    code, out, _ = run(ckpt, "--against", offer(Refuses()))
    assert code == 1
    assert "FAIL: 0 of 0 activations in 0 of 7 calls compared" in out
    assert "not covered: not today" in out


def test_what_a_backend_lacks_is_counted(ckpt: Path, run: Callable, offer: Callable) -> None:
    code, out, _ = run(ckpt, "--against", offer(Offering(Oracle(), "logits")))
    assert code == 0
    assert "3 of 7 calls offer their logits alone" in out
    assert "4 of 7 calls not covered: decoding is not offered" in out
    assert "PASS: 6 of 6 activations in 3 of 7 calls within bounds" in out  # with each KL


ENGINE_CALLS = ["48 tokens", "48 tokens, then 2", "48 tokens, step 1", "48 tokens, step 2"]


@pytest.fixture
def derived(tmp_path: Path) -> Path:
    return write(tmp_path / "x.safetensors", dataclasses.replace(CONFIG, head_dim=8))


class Fused(Engine):
    """An engine whose logits are computed without it; ``fault`` changes those of the engine."""

    def __init__(self, fault: Callable = lambda engine, rows, logits: logits) -> None:
        self.fault = fault

    def logits(self, *arguments: Any) -> Any:
        return self.run(*arguments)

    def continued(self, rows: Any) -> Any:
        return self.fault(self, rows, super().continued(rows))


def test_an_engine_is_run_by_start_and_append(
    derived: Path, run: Callable, report: Callable, offer: Callable
) -> None:
    for engine in (Engine(), Fused()):
        spec = offer(engine)
        code, out, _ = run(derived, "--against", spec)
        assert code == 0, out
        assert "1 of 7 calls show the logits of their last token alone (48 tokens, then 2)" in out
        assert "PASS: 8 of 8 activations in 4 of 7 calls within bounds" in out
        found = report(derived, "--against", spec, "--dtype", "float64")
        covered = [
            c["name"]
            for c, how in zip(found["calls"], found["coverage"], strict=True)
            if "logits" in how
        ]
        assert covered == ENGINE_CALLS


@pytest.mark.parametrize(
    ("width", "first"), [(48, "48 tokens"), (2, "48 tokens, then 2"), (1, "48 tokens, step 1")]
)
def test_a_wrong_engine_is_found_at_its_first_wrong_call(
    derived: Path, report: Callable, offer: Callable, width: int, first: str
) -> None:
    """Though the logits of its passes without it are right."""
    spec = offer(Fused(lambda _, rows, x: x * np.float32(1 + 0.01 * (len(rows[0]) == width))))
    found = report(derived, "--against", spec, "--no-diagnose")
    assert not found["verdict"]["holds"]
    assert found["calls"][found["first_divergence"]["call"]]["name"] == first


def test_a_bug_of_an_engines_cache_is_named(
    derived: Path, report: Callable, offer: Callable
) -> None:
    class Trimmed(Fused):
        def append(self, tokens: Any) -> Any:
            for past in self.pasts:
                for kept in (part for layer in past for part in layer):
                    kept[:, -1] = 0
            return super().append(tokens)

    found = report(derived, "--against", offer(Trimmed()), "--dtype", "float64")
    assert named(found) == [["cache_trimmed"]]
    assert found["unexplained"] == 0
    assert {row["call"] for row in found["rows"] if row["status"] == "diverges"} == {1, 2, 3}


def test_the_logits_of_tokens_that_are_not_judged_count_nowhere(
    derived: Path, report: Callable, run: Callable, offer: Callable, tmp_path: Path
) -> None:
    """Of an engine all but the last, and of any port padding."""
    spec = offer(Fused(lambda _, rows, x: -x))
    found = report(derived, "--against", spec, "--no-diagnose")
    kl = {entry["name"]: entry["kl"] for entry in found["logits"]}
    assert [[value is None for value in row] for row in kl["48 tokens, then 2"]] == [
        [True, False]
    ] * 2
    out = run(derived, "--against", spec, "--no-diagnose", "--html", tmp_path / "x.html")[1]
    assert "logits of 48 tokens, then 2: KL " in out
    assert "first choice differs at 2 of 2 positions" in out
    assert "Padding is not judged" not in out  # the padded call is not made
    page = (tmp_path / "x.html").read_text()
    assert "48 tokens, then 3 more calls: at most " in page
    assert "first choice differs at 8 of 102" in page


def test_why_an_engine_is_not_run_is_said(derived: Path, run: Callable, offer: Callable) -> None:
    class OneRow(Fused):
        def start(self, config: Any, params: Any, rows: Any) -> Any:
            raise NotImplementedError("one row at a time")

    class Described(Backend):
        dtypes, limits = ("float32",), Limits(masks="causal")

        def logits(self, *arguments: Any) -> Any:
            raise NotImplementedError("not today")

    code, out, _ = run(derived, "--against", offer(OneRow()))
    assert code == 0
    assert "PASS: 2 of 2 activations in 1 of 7 calls within bounds" in out
    assert "3 of 7 calls not covered: one row at a time (48 tokens, then 2; " in out
    code, out, _ = run(derived, "--against", offer(Described()))
    assert code == 1
    assert "not covered: not today" in out


@pytest.mark.parametrize("shape", ["[2, 1, 300]", "[300]"])
def test_an_engine_of_another_shape_is_one_line(
    derived: Path, run: Callable, offer: Callable, shape: str
) -> None:
    fault = (lambda _, r, x: x[:, None]) if "1" in shape else (lambda _, r, x: x[0])
    code, out, err = run(derived, "--against", offer(Fused(fault)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "start and append must return logits [B, V] of [2, 300] on the call '48 tokens', " in err
    assert f"got {shape}" in err


def test_a_backends_own_error_is_one_line(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Broken:
        def logits(self, *arguments: Any) -> Any:
            raise KeyError("oops")

    code, out, err = run(ckpt, "--against", offer(Broken()))
    assert (code, out) == (2, "")
    assert "logits failed on the call '48 tokens': KeyError: 'oops' (" in err
    assert err.count("\n") == 1
