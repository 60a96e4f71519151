"""compare.py: differences by design, float32 angles and epsilon, declared by the port and not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison.logprobs import given_targets, target_logprobs
from llama_parity.comparison.report_rows import RowEntry
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import LOGPROBS, Call
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.limits import Limits

from ..backends.torch_model import save_numpy
from ..backends.transformers_backend import backend as transformers
from ..conformance.strategies import cast, random_params
from ..planted.port import Planted
from ..suite import toy_ports
from .comparing import QUICK, Offering, contents, named, write

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


ANGLES = {"float32_angles": "true"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trace_declares_float32_angles_in_its_metadata(
    tmp_path: Path, report: Callable, run: Callable, dtype: str
) -> None:
    """Activations, logits alone and log-probabilities alone; undeclared, the remedy is told."""
    path = write(tmp_path / "far.safetensors", FAR)
    call = Call("far", np.arange(12)[None], FAR.max_seq_len - 12 + np.arange(12)[None])
    trace = traced(path, call, toy_ports.Float32Angles(), dtype)
    for shown in ("logits", LOGPROBS):
        metadata, tensors = contents(trace)
        other = ({"logits", LOGPROBS} - {shown}).pop()
        del tensors[f"call.0.{other}"]
        for declared in (ANGLES, {}, {"float32_angles": "false"}):
            save_numpy(tensors, tmp_path / "some.safetensors", metadata | declared)
            argv = (path, "--against", tmp_path / "some.safetensors", "--no-diagnose")
            found = report(*argv)
            assert found["verdict"]["holds"] == (declared is ANGLES)
            assert ("documented" in statuses(found)) == (declared is ANGLES)
            remedy = 'declare it in the metadata of the trace, "float32_angles": "true"'
            assert (remedy in found["warnings"]) == (declared is not ANGLES)
    save_numpy(tensors, tmp_path / "some.safetensors", metadata | {"float32_angles": "yes"})
    code, _, err = run(*argv)
    assert (code, err.count("\n")) == (2, 1)
    assert "its metadata says float32_angles yes, not true or false" in err


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_traces_declaration_hides_no_bug(tmp_path: Path, report: Callable, dtype: str) -> None:
    path = write(tmp_path / "far.safetensors", FAR)
    call = Call("far", np.arange(12)[None], FAR.max_seq_len - 12 + np.arange(12)[None])
    port = toy_ports.Float32AnglesWithBfloat16Frequencies()
    trace = traced(path, call, port, dtype)
    metadata, tensors = contents(trace)
    save_numpy(tensors, trace, metadata | ANGLES)
    assert not report(path, "--against", trace, "--no-diagnose")["verdict"]["holds"]


def traced(path: Path, call: Call, port: Any, dtype: str) -> Path:
    """Write a trace of a port's logits and log-probabilities of the next tokens."""
    params = dict(Checkpoint(path, dtype))
    logits = port.logits(FAR, params, call.tokens, call.positions, None)

    def fill(writer: TraceWriter) -> None:
        writer.add(0, "logits", logits)
        writer.add(0, LOGPROBS, target_logprobs(logits, given_targets(call)))

    trace = path.with_name("trace.safetensors")
    write_trace(trace, FAR, [call], dtype, fill)
    return trace


def test_a_backend_of_transformers_declares_float32_angles(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    limits = Limits(float32_angles=("float32",))
    spec = offer(Offering(transformers, "traced_decode", "logits", limits=limits))
    found = report(ckpt, "--against", spec)
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
