"""docs/trace_writer.hpp compiles, and its traces are read back exactly."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError

from llama_parity import compare
from llama_parity.comparison.trace_file import TraceFile
from llama_parity.comparison.trace_format import AXES
from reference_np.config import LlamaConfig
from reference_np.naming import activation_axes

from ..backends.torch_model import save_numpy
from ..conformance.strategies import cast, random_params
from .comparing import contents

DOCS = Path(__file__).parents[2] / "docs"
HAS_FULL = Path("/dev/full").exists()

# Cases that the example has none of: text that JSON escapes, odd sizes, every dtype, a scalar.
CORNERS = r"""
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include "trace_writer.hpp"

int main(int, char** argv) {
  const std::string how = argv[2];
  try {
    TraceWriter trace(argv[1], how == "no room" ? 700 : 2001);
    trace.metadata("config", "{}");
    trace.metadata("dtype", "bfloat16");
    if (how != "no calls") trace.metadata("calls", "[]");
    const char text[] = "\"quoted\" \\ back / \b\f\n\r\t \x01\x1f\x7f\0 \xc3\xa9 \xf0\x9f\xa6\x99";
    trace.metadata("key \"\\\n", std::string(text, sizeof text - 1));
    const std::uint8_t mask[] = {1, 0, 1};
    const double f64[] = {0.1, -1e300};
    const float f32[] = {0.1f, -3.5f};
    const std::uint16_t bf16[] = {0x3f80, 0xc020}, f16[] = {0x3c00, 0xc100};
    const std::int32_t i32[] = {-7, 1 << 30};
    const std::int64_t i64[] = {-9, std::int64_t{1} << 40};
    trace.add("mask \"\\\t", "BOOL", {3}, mask);  // three bytes: the rest is unaligned
    trace.add("u8", "U8", {1, 3}, mask);
    trace.add("f64", "F64", {2}, f64);
    trace.add("f32", "F32", {1, 2}, f32);
    trace.add("bf16", "BF16", {2, 1}, bf16);
    trace.add("f16", "F16", {2}, f16);
    trace.add("i32", "I32", {2}, i32);
    trace.add("i64", "I64", {2}, i64);
    trace.add("scalar", "F32", {}, f32);
    if (how == "same tensor") trace.add("f32", "F32", {2}, f32);
    if (how == "same key") trace.metadata("version", "3");
    if (how == "dtype") trace.add("x", "float", {2}, f32);
    if (how != "unfinished") trace.finish();
    if (how == "late") trace.add("x", "F32", {2}, f32);
  } catch (const std::exception& error) {
    std::cerr << error.what();
    return 1;
  }
}
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    pytest.skip("no C++ compiler: none of c++, g++, clang++ is on PATH")


def compile_cpp(compiler: str, source: Path, program: Path) -> Path:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{DOCS}"]
    built = subprocess.run(
        [compiler, *flags, source, "-o", program], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def example(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("cpp") / "example"
    return compile_cpp(compiler, DOCS / "trace_example.cpp", program)


@pytest.fixture(scope="module")
def corners(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    source = folder / "corners.cpp"
    source.write_text(CORNERS, encoding="utf-8")
    return compile_cpp(compiler, source, folder / "corners")


def run(*command: object) -> tuple[int, str]:
    """Return the exit code and stderr."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def assert_same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def test_the_example_writes_what_it_says(example: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    assert run(example, path) == (0, "")
    metadata, tensors = contents(path)
    hf = json.loads(metadata.pop("config"))
    config = LlamaConfig.from_hf(hf)
    assert (config.dim, config.vocab_size, config.n_layers) == (4, 5, 1)
    assert json.loads(metadata.pop("axes")) == AXES
    assert json.loads(metadata.pop("calls")) == [{"name": "prompt", "after": None}]
    assert metadata == {
        "format": "llama-trace",
        "version": "2",
        "dtype": "float32",
        "producer": "trace_example.cpp",
    }
    expected = {
        "call.0.tokens": np.array([[4, 0, 2]], np.int64),
        "call.0.embed": (np.arange(12, dtype=np.float32) / 2 - 2).reshape(1, 3, 4),
        "call.0.logits": (1 / np.arange(1, 16, dtype=np.float32)).reshape(1, 3, 5),
        "call.0.targets": np.array([[0, 2, -100]], np.int64),
        "call.0.target_logprobs": np.array([[-1.5, -1.75, 0]], np.float32),
        "step.0.batch.0.tokens": np.array([[4, 0, 2]], np.int64),
        "step.0.batch.0.targets": np.array([[0, 2, -100]], np.int64),
        "step.0.loss": np.array(1.625, np.float32),
        "step.0.grad.model.norm.weight": np.array([0.5, -0.25, 0, 1], np.float32),
    }
    trace = TraceFile(path)
    assert (len(trace.calls), len(trace.steps), trace.unknown) == (1, 1, [])
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert_same(tensors[name], value)


def test_compare_reads_the_example(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers are invented and most are missing, which compare.py reports."""
    path = tmp_path / "mine.safetensors"
    run(example, path)
    config = LlamaConfig.from_hf(json.loads(contents(path)[0]["config"]))
    weights = cast(random_params(config, 0), np.float32)
    save_numpy(weights, tmp_path / "ckpt.safetensors", {"config": config.to_json()})
    arguments = [str(tmp_path / "ckpt.safetensors"), "--against", str(path), "--json", "-"]
    assert compare.main(arguments) == 1
    report = json.loads(capsys.readouterr().out)
    status = {row["name"]: row["status"] for row in report["rows"]}
    assert status.pop("embed") == status.pop("logits") == "diverges"
    assert status.pop("logits.kl") == "inherits"
    assert status.pop("target_logprobs") == "diverges"
    training = {row["name"]: row["status"] for row in report["training"]["rows"]}
    assert training == dict.fromkeys(("step 0 loss", "step 0 grad model.norm.weight"), "diverges")
    assert set(status) == set(activation_axes(config)) - {"embed", "logits"}
    assert set(status.values()) == {"missing"}


def test_every_dtype_and_any_text_survive(corners: Path, tmp_path: Path) -> None:
    path = tmp_path / "corners.safetensors"
    assert run(corners, path, "all") == (0, "")
    metadata, tensors = contents(path)
    text = '"quoted" \\ back / \b\f\n\r\t \x01\x1f\x7f\0 \u00e9 \U0001f999'
    assert metadata['key "\\\n'] == text
    expected = {
        'mask "\\\t': np.array([True, False, True]),
        "u8": np.array([[1, 0, 1]], np.uint8),
        "f64": np.array([0.1, -1e300]),
        "f32": np.array([[0.1, -3.5]], np.float32),
        "bf16": np.array([[1.0], [-2.5]], ml_dtypes.bfloat16),
        "f16": np.array([1.0, -2.5], np.float16),
        "i32": np.array([-7, 1 << 30], np.int32),
        "i64": np.array([-9, 1 << 40], np.int64),
        "scalar": np.array(0.1, np.float32),
    }
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert_same(tensors[name], value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no room", "header full; raise header_room"),
        ("no calls", "metadata calls is missing"),
        ("same tensor", "f32 added twice"),
        ("same key", "metadata version set twice"),
        ("dtype", "x has the unknown dtype float"),
        ("late", "cannot write"),
    ],
)
def test_misuse_is_loud(corners: Path, tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "out.safetensors"
    assert run(corners, path, how) == (1, f"{path}: {message}")


def test_an_unfinished_file_is_no_trace(corners: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert run(corners, path, "unfinished") == (0, "")
    with pytest.raises(SafetensorError, match="header"):
        contents(path)


@pytest.mark.parametrize(
    "path",
    [
        "/no/such/folder/out.safetensors",
        pytest.param(
            "/dev/full", marks=pytest.mark.skipif(not HAS_FULL, reason="no /dev/full here")
        ),
    ],
)
def test_a_disk_that_takes_nothing_is_loud(example: Path, path: str) -> None:
    assert run(example, path) == (1, f"{path}: cannot write\n")


def test_the_page_lists_the_activations_of_the_oracle() -> None:
    page = (DOCS / "trace-format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:layers\.\{i\}\.)?[a-z_]+)` \| (BT[A-Z]+) \|", page, re.MULTILINE)
    config = LlamaConfig(4, 1, 2, 1, 2, 8, 5)
    listed = [(name.replace("{i}", "0"), axes) for name, axes in rows]
    assert listed == list(activation_axes(config).items())
