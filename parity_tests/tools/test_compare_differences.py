"""compare.py: differences by design, float32 angles and epsilon, declared by the port and not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison.report_rows import RowEntry
from reference_np.config import LlamaConfig
from reference_np.limits import Limits

from ..backends.torch_model import save_numpy
from ..conformance.strategies import cast, random_params
from ..planted.port import Planted
from ..suite import toy_ports
from .comparing import QUICK, named, write

DTYPES = ("float64", "float32")
# Wide heads: most of their frequencies turn far, by angles that float32 rounds.
FAR = LlamaConfig(64, 2, 4, 2, 32, 96, 300, max_seq_len=65_536)


def statuses(found: dict[str, Any]) -> dict[str, list[RowEntry]]:
    by_status: dict[str, list[RowEntry]] = {}
    for row in found["rows"]:
        by_status.setdefault(row["status"], []).append(row)
    return by_status


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_declared_float32_angles_are_a_documented_difference(
    tmp_path: Path, run: Callable, report: Callable, offer: Callable, dtype: str, scaled: bool
) -> None:
    fields = {"rope_type": "llama3", "rope_factor": 8.0} if scaled else {}
    path = write(tmp_path / "far.safetensors", dataclasses.replace(FAR, **fields))
    argv = (path, "--against", offer(toy_ports.Float32Angles()), "--dtype", dtype, *QUICK)
    found = report(*argv)
    assert found["verdict"]["holds"], found["verdict"]["line"]
    assert set(statuses(found)) <= {"ok", "documented"}
    assert "documented" in statuses(found)
    assert "rotary angles that are multiplied in float32, as declared" in found["warnings"]
    out = run(*argv, "--all")[1]
    assert "Documented difference: " in out


@pytest.mark.parametrize("dtype", DTYPES)
def test_undeclared_float32_angles_fail_and_are_named(
    tmp_path: Path, report: Callable, offer: Callable, dtype: str
) -> None:
    path = write(tmp_path / "far.safetensors", FAR)
    spec = offer(toy_ports.Float32AnglesUndeclared())
    found = report(path, "--against", spec, "--dtype", dtype, *QUICK)
    assert not found["verdict"]["holds"]
    assert "errors are those of rotary angles that are multiplied in float32" in found["warnings"]
    assert f"Limits(float32_angles=({dtype!r},))" in found["warnings"]


@pytest.mark.parametrize(
    "port",
    [toy_ports.Float32AnglesWithBfloat16Frequencies, toy_ports.Float32AnglesWithPositionsOneLate],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_declaration_hides_no_bug(
    tmp_path: Path, report: Callable, offer: Callable, port: type, dtype: str
) -> None:
    path = write(tmp_path / "far.safetensors", FAR)
    found = report(path, "--against", offer(port()), "--dtype", dtype, *QUICK)
    assert not found["verdict"]["holds"]
    assert found["first_divergence"]["name"] == "logits"


def test_another_bug_is_not_taken_for_float32_angles(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    for bug in ("silu_on_up", "rope_interleaved", "norm_low_precision", "matmul_tf32"):
        found = report(ckpt, "--against", offer(Planted(bug)), *QUICK)
        assert "multiplied in float32" not in found["warnings"]


def test_activations_by_float32_angles(ckpt: Path, report: Callable, offer: Callable) -> None:
    """Transformers' Llama, all of whose activations are shown."""
    found = report(ckpt, "--against", "hf")
    assert "errors are those of rotary angles that are multiplied in float32" in found["warnings"]
    assert "declare" not in found["warnings"]  # it has no limits

    class Declares:
        dtypes, limits = ("float32",), Limits(float32_angles=("float32",))

        def __init__(self) -> None:
            from ..backends.transformers_backend import backend

            self.inner = backend

        def logits(self, *arguments: Any) -> Any:
            return self.inner.logits(*arguments)

        def traced_decode(self, *arguments: Any) -> Any:
            return self.inner.traced_decode(*arguments)

    found = report(ckpt, "--against", offer(Declares()))
    assert found["verdict"]["holds"], found["verdict"]["line"]
    kinds = {row["kind"] for row in statuses(found)["documented"]}
    assert {"q_rope", "k_rope"} <= kinds


@pytest.fixture
def small_inputs(tmp_path: Path) -> Path:
    """Return a checkpoint with embeddings so small that epsilon's last digits matter."""
    config = LlamaConfig(32, 2, 4, 2, 8, 48, 300, max_seq_len=2048, norm_eps=3e-6)
    path = tmp_path / "eps.safetensors"
    params = cast(random_params(config, 0, embed_scale=1e-3), np.float32)
    save_numpy(params, path, {"config": config.to_json()})
    return path


def test_a_float32_epsilon_is_judged_as_it_is_declared(
    small_inputs: Path, report: Callable, offer: Callable
) -> None:
    for port, holds in (
        (toy_ports.Float32Epsilon(), True),
        (toy_ports.Float32EpsilonUndeclared(), False),
        (toy_ports.Small(), True),
    ):
        spec = offer(port)
        found = report(small_inputs, "--against", spec, "--dtype", "float64", *QUICK)
        assert found["verdict"]["holds"] == holds
        if not holds:
            assert named(found) == [["epsilon_in_float32"]]
            assert "declare limits = " in found["diagnosis"][0]["sentence"]
            assert "Limits(float32_epsilon=True)" in found["diagnosis"][0]["sentence"]
