"""compare.py and the values and names of a hostile trace: one line, or printed safely."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llama_parity.comparison.trace_file import TraceFile

from ..backends.torch_model import save_numpy

HOSTILE = "[red]a[/nothing]\x1b[2J\r\n\u202e" + "long " * 10_000


@pytest.fixture
def trace(ckpt: Path, run: Callable, tmp_path: Path) -> tuple[Path, dict[str, str], dict]:
    """Return a trace's path, metadata and tensors; its first call has tokens [1, 5]."""
    path = tmp_path / "trace.safetensors"
    assert run(ckpt, "--trace", path, "--tokens", 5, "--steps", 0)[0] == 0
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return path, file.metadata(), tensors


def padded(value: int, dtype: type) -> np.ndarray:
    mask = np.tril(np.ones((1, 5, 5), dtype))
    mask[0, 2, 1] = value
    return mask


POSITIONS = np.arange(5)[None]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", padded(2, np.uint8), "call.0.mask holds 2, not 0 and 1 alone"),
        ("mask", padded(255, np.uint8), "call.0.mask holds 255, not 0 and 1 alone"),
        ("mask", padded(np.nan, np.float32), "call.0.mask is stored as F32, not as BOOL, U8"),
        ("mask", padded(1, np.uint8)[:, :, 1:], "call 0: mask must be bool"),
        ("positions", POSITIONS - 1, "call.0.positions holds -1, not 0 to 2147483647 alone"),
        ("positions", POSITIONS + 2**31, "call.0.positions holds 2147483648, not 0 to"),
        ("positions", POSITIONS.astype(np.float32), "call.0.positions is stored as F32, not as"),
        ("positions", POSITIONS[0], "call 0: positions must be integer (2, 5), got int64 (5,)"),
        ("tokens", POSITIONS + 299, "call 0: token id 300 is outside the vocabulary of 300"),
        ("tokens", POSITIONS - 1, "call 0: token id -1 is outside the vocabulary of 300"),
        ("tokens", POSITIONS[:, :0], "call 0: tokens must be non-empty integers [B, T]"),
    ],
)
def test_a_value_outside_its_domain_is_one_line(
    ckpt: Path, run: Callable, trace: tuple, name: str, value: np.ndarray, message: str
) -> None:
    path, metadata, tensors = trace
    save_numpy(tensors | {f"call.0.{name}": value}, path, metadata)
    code, out, err = run(ckpt, "--against", path)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_byte_of_a_boolean_mask_is_read_as_it_is_stored(
    ckpt: Path, run: Callable, trace: tuple
) -> None:
    """NumPy would take a boolean of 2 for true in one place and for its bit in another."""
    path, metadata, tensors = trace
    mask = padded(1, np.bool_)
    mask.view(np.uint8)[0, 4, 4] = 3
    save_numpy(tensors | {"call.0.mask": mask}, path, metadata)
    code, _, err = run(ckpt, "--against", path)
    assert code == 2
    assert "call.0.mask holds 3, not 0 and 1 alone" in err


def test_names_are_printed_safely(
    ckpt: Path, run: Callable, trace: tuple, tmp_path: Path, report: Callable
) -> None:
    """A call's name, and tensors' names, with a terminal's commands in them, markup and length."""
    path, metadata, tensors = trace
    calls = json.loads(metadata["calls"])
    calls[0]["name"] = HOSTILE
    tensors["call.0.logits"] = tensors["call.0.logits"] + 1
    extra = {HOSTILE: np.zeros(1, np.float32)}
    save_numpy(tensors | extra, path, metadata | {"calls": json.dumps(calls)})
    html = tmp_path / "page.html"
    code, out, _ = run(ckpt, "--against", path, "--html", html, "--no-diagnose")
    assert code == 1
    assert "[red]a[/nothing]" in out
    for text in (out, html.read_text()):
        assert all(line.isprintable() for line in text.split("\n"))
        assert "long " * 20 not in text
    found = report(ckpt, "--against", path, "--no-diagnose")
    assert len(found["calls"][0]["name"]) <= 80


def test_names_of_the_format_are_known(trace: tuple) -> None:
    """And none beside them: no layer, call or kind that there is not."""
    path, metadata, tensors = trace
    assert TraceFile(path).unknown == []
    extra = (
        *("call.0.layers.2.q", "call.0.layers.01.q", "call.0.layers.0.logits", "call.0.q"),
        *("call.99.embed", "call.99999999999.embed", "call.0.embed.", "call.\u0660.embed", "embed"),
    )
    save_numpy(tensors | dict.fromkeys(extra, np.zeros(1, np.float32)), path, metadata)
    assert TraceFile(path).unknown == sorted(extra)


def test_a_long_chain_of_calls_is_read_at_once(trace: tuple) -> None:
    path, metadata, _ = trace
    n = 5000
    calls = [{"name": "a", "after": c - 1 if c else None} for c in range(n)]
    tokens = {f"call.{c}.tokens": np.zeros((1, 1), np.int64) for c in range(n)}
    save_numpy(tokens, path, metadata | {"calls": json.dumps(calls)})
    assert len(TraceFile(path).calls) == n
