"""What the fuzzing watches for would be seen: readers that break each rule, and honest ones."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_common.notes import note
from reference_np.config import InputError as OracleInputError

from . import mutations, outcomes
from .outcomes import outcome, require_line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "folder"
    inner.mkdir()
    (inner / "file").write_text("text")
    (tmp_path / "other").write_text("another's")
    return inner


def refuse(error: type[Exception], message: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        raise error(message.format(folder))

    return read


def test_a_value_and_a_refusal_are_returned(folder: Path) -> None:
    assert outcome(lambda folder: (folder / "file").read_text(), folder).value == "text"
    refusal = refuse(InputError, "{}/file: wrong")
    assert outcome(refusal, folder).refusal == f"{folder}/file: wrong"
    refusal = refuse(OracleInputError, "{}/file: wrong")
    assert outcome(refusal, folder, "reference_np").refusal == f"{folder}/file: wrong"


@pytest.mark.parametrize("error", [ValueError, OracleInputError, KeyError, RecursionError])
def test_another_exception_is_no_refusal(folder: Path, error: type[Exception]) -> None:
    with pytest.raises(error):
        outcome(refuse(error, "{}/file: wrong"), folder)


def test_a_refusal_names_a_file(folder: Path) -> None:
    with pytest.raises(AssertionError, match="names no file"):
        outcome(refuse(InputError, "wrong"), folder)
    with pytest.raises(AssertionError, match="names no file"):
        outcome(refuse(InputError, "--flag: wrong"), folder)
    assert outcome(refuse(InputError, "--flag: wrong"), folder, names_flags=True).refusal


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r", "\x1b[31m", "\0", "\x7f", "\u2028", "\u202e", "\ud800", "x" * 5000]
)
def test_characters_that_act_and_long_lines_are_seen(text: str) -> None:
    with pytest.raises(AssertionError):
        require_line(text)


def test_what_is_printed_on_stderr_is_seen(folder: Path) -> None:
    def print_raw(folder: Path) -> None:
        print("\x1b[31m", file=sys.stderr)

    with pytest.raises(AssertionError, match="holds"):
        outcome(print_raw, folder)
    outcome(lambda folder: note("\x1b[31m"), folder)  # which escapes it


def test_time_and_memory_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "SECONDS", 0.2)

    def loop(folder: Path) -> None:
        while True:
            with contextlib.suppress(Exception):
                re.sub("a", "b", "a" * 1000)

    with pytest.raises(AssertionError, match=r"SlowError: over 0\.2 s"):
        outcome(loop, folder)
    with pytest.raises(AssertionError, match="1[4-9][0-9] MiB, of 128 MiB"):
        outcome(lambda folder: len(b"x" * (150 << 20)), folder)
    with pytest.raises(AssertionError, match="MemoryError"):
        outcome(lambda folder: bytearray(1 << 40), folder)
    outcome(lambda folder: len(b"x" * (50 << 20)), folder)


BREACHES: dict[str, Callable[[Path], Any]] = {
    "reads another's file": lambda folder: (folder.parent / "other").read_text(),
    "reads it by a relative name": lambda folder: Path("../other").read_text(),
    "reads it through a link": lambda folder: (folder / "link").read_text(),
    "lists another folder": lambda folder: os.listdir(folder.parent),
    "writes": lambda folder: (folder / "new").write_text(""),
    "opens to write": lambda folder: os.open(folder / "file", os.O_RDWR),
    "removes": lambda folder: (folder / "file").unlink(),
    "renames": lambda folder: (folder / "file").rename(folder / "new"),
    "makes a folder": lambda folder: (folder / "new").mkdir(),
    "begins a process": lambda folder: subprocess.run(["true"], check=False),
    "opens a connection": lambda folder: socket.socket(),
}


@pytest.mark.parametrize("read", BREACHES.values(), ids=BREACHES)
def test_what_leaves_the_folder_is_seen_and_prevented(
    folder: Path, read: Callable[[Path], Any]
) -> None:
    (folder / "link").symlink_to("../other")

    def swallow(folder: Path) -> None:
        with contextlib.suppress(BaseException):
            read(folder)

    for reader in (read, swallow):
        with pytest.raises(AssertionError):
            outcome(reader, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["file", "link"]


def test_a_reader_that_may_write_writes_in_its_folder_alone(folder: Path) -> None:
    outcome(lambda folder: (folder / "new").write_text(""), folder, writes=True)
    with pytest.raises(AssertionError, match="writes"):
        outcome(lambda folder: (folder.parent / "new").write_text(""), folder, writes=True)
    assert not (folder.parent / "new").exists()


def test_mutations_differ_and_are_the_same_for_the_same_choices() -> None:
    contents = {
        mutations.mutated_json: b'{"a": [1, 2.5, "x", null], "b": {"c": "{\\"d\\": 1}"}}',
        mutations.mutated_bytes: b"some bytes",
        mutations.mutated_safetensors: b"\x08" + bytes(7) + b'{"a": 1}data',
        mutations.mutated_toml: b'[a]\nb = 1\nc = "d"\n',
        mutations.mutated_text: b"{{ a }} text",
        mutations.mutated_lines: b'{"a": 1}\n{"b": 2}\n',
    }
    for mutate, content in contents.items():
        found = [mutate(Random(seed), content) for seed in range(300)]
        assert len(set(found)) > 100
        assert found == [mutate(Random(seed), content) for seed in range(300)]
