"""The golden vectors' readers in C++, JavaScript and NumPy compute them, and see a changed one."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ..vectors.check import INDEX, VECTORS, copy_vectors, load_index

READERS = VECTORS / "readers"
CASES = [case for case in load_index()["cases"] if case["kind"] != "training"]
PLANTED = "decode-rows"  # several calls of several rows


def compiled(folder: Path) -> list[str]:
    """Return the command of the C++ reader; skip where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: none of c++, g++, clang++ is on PATH")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    program = folder / "reader"
    command = [compiler, *flags, str(READERS / "reader.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return [str(program)]


def script(language: str) -> list[str]:
    """Return the command of another reader; skip where node is not there."""
    if language == "NumPy":
        return [sys.executable, str(READERS / "reader.py")]
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    return [node, str(READERS / "reader.mjs")]


@pytest.fixture(scope="module", params=["C++", "JavaScript", "NumPy"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if request.param == "C++":
        return compiled(tmp_path_factory.mktemp("reader"))
    return script(request.param)


def run(reader: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run([*reader, str(folder)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def change(path: Path, name: str, factor: float) -> None:
    """Multiply the last number of a tensor."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])[name]
    kind = {"F64": "<d", "F32": "<f"}[entry["dtype"]]
    at = 8 + length + entry["data_offsets"][1] - struct.calcsize(kind)
    (value,) = struct.unpack_from(kind, content, at)
    struct.pack_into(kind, content, at, value * factor)
    path.write_bytes(content)


@pytest.mark.numeric
def test_a_reader_computes_every_case_with_calls(reader: list[str]) -> None:
    code, output = run(reader, VECTORS)
    assert code == 0, output
    calls = sum(len(case["real"]) for case in CASES)
    assert output.startswith((f"{len(CASES)} cases, largest error 0.00", f"{calls} calls, "))
    assert "FAILED" not in output


def test_a_changed_result_or_weight_fails(reader: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    copy_vectors(folder)
    change(folder / f"traces/{PLANTED}.safetensors", "call.2.logits", 1 + 1e-6)
    change(folder / "models/dim-64.safetensors", "model.layers.0.mlp.up_proj.weight", 1.5)
    code, output = run(reader, folder)
    assert code == 1, output
    failed = {line.split()[1].rstrip(":") for line in output.splitlines() if "FAILED" in line}
    assert failed == {PLANTED, "causal-dim-64"}


def test_another_schema_version_is_refused(reader: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    copy_vectors(folder)
    for name in (INDEX, "index.txt"):
        text = (folder / name).read_text(encoding="utf-8")
        text = text.replace('"schema_version": 1', '"schema_version": 2')
        text = text.replace("llama-vectors 1\n", "llama-vectors 2\n")
        (folder / name).write_text(text, encoding="utf-8")
    code, output = run(reader, folder)
    assert code not in (0, -6), output
    assert len(output.splitlines()) == 1
