"""compare.py: backends that offer a part of the protocol, overwrite their inputs, or fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conformance.oracle import Oracle
from ..planted.port import Planted
from .comparing import QUICK, named


def test_a_trace_without_decoding(ckpt: Path, report: Callable, offer: Callable) -> None:
    class OneCall:
        dtypes = ("float32",)

        def __init__(self, bug: str) -> None:
            self.inner = Planted(bug)

        def logits(self, *arguments: Any) -> Any:
            return self.inner.logits(*arguments)

        def trace(self, *arguments: Any) -> Any:
            return self.inner.trace(*arguments)

    assert report(ckpt, "--against", offer(OneCall("")), *QUICK)["verdict"]["holds"]
    found = report(ckpt, "--against", offer(OneCall("silu_on_up")), *QUICK)
    assert named(found) == [["silu_on_up"]]


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
    class OnlyLogits:
        dtypes = ("float32",)

        def logits(self, *arguments: Any) -> Any:
            return Oracle().logits(*arguments)

    code, out, _ = run(ckpt, "--against", offer(OnlyLogits()))
    assert code == 0
    assert "3 of 7 calls offer their logits alone" in out
    assert "4 of 7 calls not covered: decoding is not offered" in out
    assert "PASS: 6 of 6 activations in 3 of 7 calls within bounds" in out  # with each KL


def test_a_backends_own_error_is_one_line(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Broken:
        def logits(self, *arguments: Any) -> Any:
            raise KeyError("oops")

    code, out, err = run(ckpt, "--against", offer(Broken()))
    assert (code, out) == (2, "")
    assert "logits failed on the call '48 tokens': KeyError: 'oops' (" in err
    assert err.count("\n") == 1
