"""The golden vectors' readers in C++, JavaScript and NumPy judge the logits of a port."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..vectors.folder import INDEX, VECTORS, copy_vectors, load_index

CASES = [case for case in load_index()["cases"] if case["kind"] != "training"]
PLANTED = "decode-rows"  # several calls of several rows
SUFFIXES = {"C++": (".cpp", ".hpp"), "JavaScript": (".mjs",), "NumPy": (".py",)}
Reader = Callable[[Path], tuple[int, str]]


def compiled(readers: Path, program: Path) -> list[str]:
    """Return the command of the C++ reader; skip where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: none of c++, g++, clang++ is on PATH")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, str(readers / "reader.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return [str(program)]


def command(language: str, readers: Path, program: Path) -> list[str]:
    """Return the command of a reader; skip where what runs it is not there."""
    if language == "C++":
        return compiled(readers, program)
    if language == "NumPy":
        return [sys.executable, "-B", str(readers / "reader.py")]
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    return [node, str(readers / "reader.mjs")]


def run(line: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run([*line, str(folder)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=[*SUFFIXES])
def language(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def reader(language: str, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    line = command(language, VECTORS / "readers", tmp_path_factory.mktemp("reader") / "reader")
    return lambda folder: run(line, folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    copy_vectors(tmp_path / "copy")
    return tmp_path / "copy"


def changed(folder: Path, language: str, *pairs: tuple[str, str]) -> tuple[int, str]:
    """Run a copy's reader, in whose files each first word is replaced by the second."""
    readers = folder / "readers"
    files = [path for path in readers.iterdir() if path.suffix in SUFFIXES[language]]
    for old, new in pairs:
        [path] = [path for path in files if old in path.read_text(encoding="utf-8")]
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return run(command(language, readers, folder / "reader"), folder)


def failed(output: str) -> set[str]:
    return set(re.findall(r"^FAILED (\S+):", output, re.MULTILINE))


def poke(path: Path, name: str, at: int, change: Callable[[float], float]) -> None:
    """Change one number of a tensor."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])[name]
    kind = {"F64": "<d", "F32": "<f"}[entry["dtype"]]
    start = 8 + length + entry["data_offsets"][at < 0] + at * struct.calcsize(kind)
    (value,) = struct.unpack_from(kind, content, start)
    struct.pack_into(kind, content, start, change(value))
    path.write_bytes(content)


@pytest.mark.numeric
def test_a_reader_computes_every_case_with_calls(reader: Reader) -> None:
    code, output = reader(VECTORS)
    assert code == 0, output
    wanted = rf"{len(CASES)} cases, 0 calls failed, largest error (0\.\d+) of its bound\n"
    found = re.fullmatch(wanted, output)
    assert found, output
    assert float(found[1]) < 0.1


def test_a_changed_result_or_weight_fails(reader: Reader, copy: Path) -> None:
    trace, model = copy / f"traces/{PLANTED}.safetensors", copy / "models/dim-64.safetensors"
    poke(trace, "call.2.logits", -1, lambda x: x * (1 + 1e-6))
    poke(model, "model.layers.0.mlp.up_proj.weight", -1, lambda x: x * 1.5)
    poke(copy / "traces/mask-all.safetensors", "call.0.logits", 0, lambda x: float("nan"))
    poke(copy / "traces/basic-rows.safetensors", "call.0.logits", 0, lambda x: float("inf"))
    code, output = reader(copy)
    assert code == 1, output
    assert failed(output) == {PLANTED, "causal-dim-64", "mask-all", "basic-rows"}
    assert f"{len(CASES)} cases, 4 calls failed" in output


def test_padding_is_not_judged(reader: Reader, copy: Path) -> None:
    for name in ("padding-left", "padding-blind", "decode-padded"):  # padded in front
        poke(copy / f"traces/{name}.safetensors", "call.0.logits", 0, lambda x: float("nan"))
    poke(copy / "traces/padding-both.safetensors", "call.0.logits", -1, lambda x: 1e9)
    code, output = reader(copy)
    assert code == 0, output


def test_a_masked_key_has_no_part_in_the_softmax_however_large_its_score() -> None:
    code = (VECTORS / "readers" / "llama.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(code, "llama.py", "exec"), names)
    scores = np.array([[0.0, 0.0, 2000.0], [1.0, 2.0, 3.0]])
    mask = np.array([[True, True, False], [False, False, False]])
    assert names["softmax"](scores, mask).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


# The same wrong step in each language: epsilon, the scale, the mask.
BUGS = {
    "C++": (
        ("/ x.size() + eps)", "/ x.size() + 2 * eps)"),
        ("/ std::sqrt(m.width) :", ":"),
        ("= sees[s] ?", "= sees ?"),
    ),
    "JavaScript": (
        ("/ x.length + eps)", "/ x.length + 2 * eps)"),
        ("q.slice(h * k)) / Math.sqrt(k)", "q.slice(h * k))"),
        (".filter((s) => sees[s])", ""),
    ),
    "NumPy": (
        ("keepdims=True) + eps)", "keepdims=True) + 2 * eps)"),
        ('/ np.sqrt(c["head_dim"])', ""),
        ("np.where(mask, scores, -np.inf)", "scores"),
    ),
}
NANS = {
    "C++": ("one = times(head,", "one = times(NAN * head[0] > 0 ? head : Vec(head.size(), NAN),"),
    "JavaScript": ("one / root * w[i]", "NaN"),
    "NumPy": ("eps) @ head.T", "eps) @ (head.T * np.nan)"),
}


@pytest.mark.parametrize("bug", range(3))
def test_a_port_with_a_bug_in_the_place_of_ours_fails(bug: int, language: str, copy: Path) -> None:
    code, output = changed(copy, language, BUGS[language][bug])
    assert code == 1, output
    told = ("norm_eps_tenth", "scores_unscaled", "mask_forgotten")[bug]
    telling = {one["id"] for one in CASES if told in one["flags"]}
    assert len(failed(output) & telling) > 50


def test_a_port_whose_logits_are_not_numbers_fails_every_case(language: str, copy: Path) -> None:
    code, output = changed(copy, language, NANS[language])
    assert code == 1, output
    assert failed(output) == {one["id"] for one in CASES}


FLOAT32 = {
    "C++": [("using Vec = std::vector<double>", "using Vec = std::vector<float>")],
    "JavaScript": [("sum + one * b[i]", "Math.fround(sum + one * b[i])")],
    "NumPy": [
        ('astype("f8")', 'astype("f4")'),
        ("scores, -np.inf)", "scores.astype('f4'), -np.inf)"),
    ],
}
PRECISION = {
    "C++": ("PRECISION = 0;", "PRECISION = 1;"),
    "JavaScript": ('PRECISION = "float64"', 'PRECISION = "float32"'),
    "NumPy": ('PRECISION = "float64"', 'PRECISION = "float32"'),
}


def test_a_port_in_float32_is_held_to_float32s_bounds(language: str, copy: Path) -> None:
    code, output = changed(copy, language, *FLOAT32[language])
    assert code == 1, output
    assert failed(output)
    code, output = changed(copy, language, PRECISION[language])
    assert code == 0, output


def test_another_schema_version_is_refused(reader: Reader, copy: Path) -> None:
    for name in (INDEX, "index.txt"):
        text = (copy / name).read_text(encoding="utf-8")
        text = text.replace('"schema_version": 1', '"schema_version": 2')
        text = text.replace("llama-vectors 1\n", "llama-vectors 2\n")
        (copy / name).write_text(text, encoding="utf-8")
    code, output = reader(copy)
    assert code not in (0, -6), output
    assert len(output.splitlines()) == 1


def test_no_case_is_no_success(reader: Reader, copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text(encoding="utf-8"))
    (copy / INDEX).write_text(json.dumps(index | {"cases": []}), encoding="utf-8")
    (copy / "index.txt").write_text("llama-vectors 1\nend\n", encoding="utf-8")
    code, output = reader(copy)
    assert (code, output.split(",")[0]) == (1, "0 cases")


def test_what_is_cut_short_is_no_success(reader: Reader, language: str, copy: Path) -> None:
    whole = (copy / "index.txt").read_text(encoding="utf-8")
    for length in (len(whole) // 2, len(whole) - len("end\n"), whole.rindex("call") + 9):
        (copy / "index.txt").write_text(whole[:length], encoding="utf-8")
        code, output = reader(copy)
        assert code == (2 if language == "C++" else 0), output  # the others read index.json
        assert language != "C++" or output == "error: index.txt is not complete\n"
    (copy / "index.txt").write_text(whole, encoding="utf-8")
    path = copy / "traces" / f"{PLANTED}.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    code, output = reader(copy)
    assert code not in (0, -6, -11), output
