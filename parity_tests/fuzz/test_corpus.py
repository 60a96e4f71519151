"""The units that coverage-guided runs found: small, and each read or refused like any mutation."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_torch.tokenizer.pieces import read_pieces

from . import coverage_guided
from .coverage_guided import LARGEST, NAMES, arcs, is_harmless, keep
from .targets import TARGETS, run_unit

CORPUS = coverage_guided.CORPUS
LARGEST_CORPUS = 300_000  # bytes, of all targets


@pytest.mark.parametrize("name", TARGETS)
def test_every_unit_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    target.prepare(tmp_path)
    units = sorted((CORPUS / name).iterdir())
    assert units
    for path in units:
        run_unit(target, tmp_path, path.read_bytes())


def test_the_corpus_is_small_and_of_known_targets() -> None:
    assert list(TARGETS) == list(NAMES) == sorted(NAMES, key=NAMES.index)
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.name for path in CORPUS.iterdir()} == set(NAMES)
    assert max(sizes) <= LARGEST
    assert sum(sizes) <= LARGEST_CORPUS


def test_no_unit_harms_other_programs() -> None:
    assert [path.name for path in (CORPUS / "shard_index").iterdir()] == ["valid"]
    for path in CORPUS.rglob("*"):
        if path.is_file() and path.name != "valid":
            assert is_harmless(path.parent.name, path.read_bytes()), path


@pytest.mark.parametrize("unit", [b"[" * 60, b'{"a": ' * 60, b" [\n" * 60])
def test_units_that_may_are_not_kept(unit: bytes) -> None:
    assert is_harmless("config", b"[[[[]]]], [1], {}" * 30)
    assert not is_harmless("config", b"x" + unit)
    assert not is_harmless("shard_index", b"")


def test_units_that_reach_new_lines_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, found = tmp_path / "corpus", tmp_path / "new"
    for folder in (kept / "toml", found):
        folder.mkdir(parents=True)
    monkeypatch.setattr(coverage_guided, "CORPUS", kept)
    units = {"a": b"lr = 1", "b": b"lr = 1 # a longer one", "c": b"lr = true", "failure-d": b"x"}
    for name, unit in units.items():
        (found / name).write_bytes(unit)
    assert keep("toml", found) == 2
    assert {path.read_bytes() for path in (kept / "toml").iterdir()} == {b"lr = 1", b"lr = true"}
    assert keep("toml", found) == 0


def test_lines_of_readers_are_traced_and_no_others() -> None:
    assert not arcs(lambda: ast.parse("x"))
    found = arcs(lambda: read_pieces(b"\x0a\x03\x0a\x01a"))
    assert {Path(file).name for file, _, _ in found} == {"pieces.py"}


def test_a_summary_counts_what_processes_did(tmp_path: Path) -> None:
    for name in ("a1", "b2", "failure-crash-c3"):
        (tmp_path / name).write_text("")
    logs = [
        "#8 INITED cov: 5 ft: 6 corp: 1\n#90 NEW cov: 7 ft: 9 corp: 2\n#100 DONE cov: 7 ft: 9\n",
        "#2 INITED cov: 8 ft: 8 corp: 1\nValueError: wrong\n==1== ERROR: libFuzzer: exited\n",
    ]
    workers = [SimpleNamespace(name="toml", folder=tmp_path, texts=lambda: logs)]
    found = coverage_guided._summary(workers, 3)
    assert (found["executions"], found["edges"], found["features"]) == (102, 8, 9)
    assert (found["new_units"], found["failing_units"], found["failures"]) == (2, 1, 1)
    assert found["errors"] == ["==1== ERROR: libFuzzer: exited", "ValueError: wrong"]
