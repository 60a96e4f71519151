"""compare.py: traces written, read, edited, transposed and refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llama_parity import compare
from llama_parity.comparison.inputs import make_calls
from llama_parity.comparison.trace_file import TraceFile
from llama_torch.data.documents import documents
from reference_np.low_precision import round_to

from ..backends.torch_model import save_numpy
from .comparing import CALLS, CONFIG, NAMES, QUICK, Edited, contents, write


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_oracles_trace_passes_its_own_comparison(
    ckpt: Path, run: Callable, tmp_path: Path, dtype: str
) -> None:
    path = tmp_path / "trace.safetensors"
    assert run(ckpt, "--dtype", dtype, "--trace", path, "--steps", 1)[0] == 0
    with safe_open(path, framework="np") as file:
        assert set(json.loads(file.metadata()["axes"])) == {n.split(".")[-1] for n in NAMES}
        assert {f"call.3.{name}" for name in NAMES} <= set(file.keys())
    code, out, _ = run(ckpt, "--against", path)
    assert code == 0
    assert "6 calls" in out
    with safe_open(path, framework="np") as file:  # in the dtype of the metadata
        logits = file.get_tensor("call.0.logits")
    assert logits.dtype == (np.float64 if dtype == "float64" else np.float32)
    if dtype == "bfloat16":
        assert np.array_equal(logits, round_to(logits, dtype))


def test_an_edited_trace_fails_where_it_was_edited(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path)
    metadata, tensors = contents(path)
    step = "call.2.layers.1.attn"
    tensors[step] = tensors[step] * np.float32(1.001)
    tensors["call.0.surprise"] = np.zeros(1, np.float32)
    tensors["call.9.embed"] = np.zeros(1, np.float32)
    save_numpy(tensors, path, metadata)
    code, out, _ = run(ckpt, "--against", path)
    assert code == 1
    assert "first divergence at layers.1.attn (48 tokens, step 1): attention" in out
    assert "Not in the format and ignored: call.0.surprise, call.9.embed" in out
    del tensors[step]
    save_numpy(tensors, path, metadata)
    code, out, _ = run(ckpt, "--against", path, "--no-diagnose")
    assert code == 1
    assert "(missing)" in out


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """Return a function of a dtype: a checkpoint, its trace's metadata and tensors; cached."""
    folder = tmp_path_factory.mktemp("traced")
    ckpt = write(folder / "ckpt.safetensors", CONFIG)

    @functools.cache
    def make(dtype: str) -> tuple[Path, dict[str, str], dict[str, np.ndarray]]:
        path = folder / f"{dtype}.safetensors"
        argv = [ckpt, "--dtype", dtype, "--trace", path, "--tokens", 5, "--steps", 0]
        assert compare.main([str(part) for part in argv]) == 0
        return ckpt, *contents(path)

    return make


def in_memory_order(view: np.ndarray) -> np.ndarray:
    """Return a transposed array as stored by a writer that copies its memory and its shape."""
    order = np.argsort([-stride for stride in view.strides], stable=True)
    return np.ascontiguousarray(view.transpose(order)).reshape(view.shape)


@pytest.mark.parametrize(
    ("kinds", "axes"),
    [
        (("q",), (0, 2, 1, 3)),  # from [B, H, T, K]
        (("q", "k", "v", "q_rope", "k_rope", "attn"), (0, 2, 1, 3)),
        (("v",), (3, 1, 2, 0)),
        (("attn_norm", "residual", "embed", "norm"), (1, 0, 2)),
        (("logits", "gate"), (2, 1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_transposed_array_is_named(
    report: Callable, traced: Callable, tmp_path: Path, kinds: tuple, axes: tuple, dtype: str
) -> None:
    """No other activation is: they are judged by the values before the transposition."""
    ckpt, metadata, tensors = traced(dtype)
    path = tmp_path / "trace.safetensors"
    moved = {n: x for n, x in tensors.items() if n.split(".")[-1] in kinds}
    views = {n: np.ascontiguousarray(x.transpose(axes)) for n, x in moved.items()}
    stored = {n: in_memory_order(x.transpose(np.argsort(axes))) for n, x in views.items()}
    save_numpy(tensors | stored, path, metadata)
    found = report(ckpt, "--against", path, "--no-diagnose")
    wrong = {f"call.{r['call']}.{r['name']}" for r in found["rows"] if r["status"] != "ok"}
    assert wrong == {name for name in stored if not np.array_equal(stored[name], tensors[name])}
    assert {r["status"] for r in found["rows"]} == {"ok", "in another order"}
    first = found["first_divergence"]["name"]
    assert f"{first} (5 tokens) holds the right numbers in another order" in found["warnings"]
    assert "write contiguous arrays (np.ascontiguousarray first)" in found["warnings"]


def test_what_safetensors_makes_of_a_transposed_array(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    """Release 0.8.0 misorders it, which is reported; another that does not passes."""
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, "--tokens", 5, "--steps", 0)
    metadata, tensors = contents(path)
    name = "call.0.layers.0.q"
    view = np.ascontiguousarray(tensors[name].swapaxes(1, 2)).swapaxes(1, 2)
    save_file(tensors | {name: view}, path, metadata)
    right = np.array_equal(load_file(path)[name], view)  # by the release that is installed
    code, out, _ = run(ckpt, "--against", path)
    assert (code, "layers.0.q (5 tokens) holds the right numbers in another order: " in out) == (
        (0, False) if right else (1, True)
    )


def test_scrambled_numbers_are_no_other_order(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    """A tensor that no transposition makes right diverges."""
    spec = offer(Edited("layers.1.q", lambda x: x[:, ::-1]))
    found = report(ckpt, "--against", spec, *QUICK, "--no-diagnose")
    assert found["first_divergence"]["name"] == "layers.1.q"
    assert {r["status"] for r in found["rows"] if r["name"] == "layers.1.q"} >= {"diverges"}
    assert "another order" not in found["warnings"]


def test_a_trace_that_is_none_is_refused(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path)
    good, tensors = contents(path)
    other = CONFIG.to_json().replace("500000.0", "10000.0")
    for change, message in (
        ({"version": "two"}, "says version 'two', not 1 or 2; write the trace again"),
        ({"version": "0"}, "says version '0', not 1 or 2"),
        ({"version": "3"}, "is a trace of version 3, and this release reads versions 1 and 2; "),
        ({"version": "10"}, "upgrade it (pip install -U llama-parity), or write version 2"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"axes": good["axes"].replace("BTHK", "BHTK")}, "axes are not the format's for attn, q,"),
        ({"config": "{"}, "is not JSON"),
        ({"config": other}, "another architecture"),
        ({"calls": "[]"}, "lists no calls"),
        ({"calls": '[{"name": "a"}]'}, "must continue null or an earlier call"),
        ({"calls": '[{"name": "a", "after": 0}]'}, "must continue null or an earlier call"),
        ({"calls": "null"}, "lists no calls"),
        ({"calls": good["calls"][:-1] + ', {"after": null}]'}, "call.7.tokens is missing"),
    ):
        save_numpy(tensors, path, good | change)
        code, out, err = run(ckpt, "--against", path)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    for name, value, message in (
        ("tokens", tensors["call.0.tokens"].astype(np.float32), "stored as F32, not as I64, I32"),
        ("tokens", tensors["call.0.tokens"] + 300, "call 0: token id"),
        ("tokens", tensors["call.0.tokens"][:1], "call 1 continues a call of another batch size"),
        ("positions", tensors["call.0.tokens"][:, 1:], "call 0: positions must be"),
        ("mask", np.zeros((2, 48, 48), np.float32), "stored as F32, not as BOOL, U8"),
        ("mask", np.zeros([1] * 40, np.uint8), "call.0.mask has 40 axes, at most 32"),
    ):
        save_numpy(tensors | {f"call.0.{name}": value}, path, good)
        code, out, err = run(ckpt, "--against", path)
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.count("\n") == 1
    save_numpy(tensors, path, good)
    code, _, err = run(ckpt, "--against", path, "--trace", path)
    assert code == 2
    assert "would overwrite an input" in err
    code, _, err = run(ckpt, "--against", path, "--prompt", "text")
    assert code == 2
    assert "--prompt: a trace is compared on its own tokens" in err


def test_a_trace_of_more_tokens_than_attention_has_memory_for_is_refused(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    """Its file is small: the square of its tokens is not made to learn that."""
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path)
    good, _ = contents(path)
    many = {"call.0.tokens": np.zeros((1, 3_000_000), np.int32)}
    save_numpy(many, path, good | {"calls": '[{"name": "a", "after": null}]'})
    code, out, err = run(ckpt, "--against", path)
    assert (code, out) == (2, "")
    assert "call 0: the oracle's scores of attention over 3,000,000 tokens take" in err
    assert err.count("\n") == 1


def test_traces_are_read_as_they_were_written(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, "--tokens", 9)
    trace = TraceFile(path)
    calls = make_calls(np.array([b % 300 for b in _text()[:9]]), CONFIG, (9,), 2)
    assert len(trace.calls) == len(calls) == CALLS
    for ours, theirs in zip(calls, trace.calls, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _text() -> bytes:

    return next(iter(documents((), ""))).encode()
