"""Messages are one printable line of bounded length, whatever the files that they quote hold."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reference_np.config
from llama_common.cli import complain
from llama_common.errors import LONGEST, InputError, printable
from llama_common.notes import note
from llama_parity.comparison.report_rows import escape
from llama_torch import load, prepare
from llama_torch.config import TrainConfig
from llama_torch.training import command
from reference_np.checkpoint import Checkpoint

HOSTILE = "\x1b[2J\x1b]0;title\x07 \r\n\u202e\u2066 \u2028\x85\x9b31m \x00\ud800"
ERRORS = (InputError, reference_np.config.InputError)


def is_safe(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST + 100


@given(st.text(st.characters(), max_size=40), st.integers(0, 3000))
@example(HOSTILE, 1)
@example("\u202e", 10**6)
@example("x", 10**7)
def test_a_message_is_one_printable_line(text: str, times: int) -> None:
    shown = printable(text * times)
    assert is_safe(shown)
    assert printable(shown) == shown
    for kind in ERRORS:
        error = kind(f"begin {text * times} end")
        assert is_safe(str(error))
        assert (str(error)[:6], str(error)[-4:]) == ("begin ", " end")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_ordinary_text_stays() -> None:
    for text in ("/a b/c  d.txt: é 漢字 😀 'x'", ""):
        assert printable(text) == text
        assert [str(kind(text)) for kind in ERRORS] == [text] * len(ERRORS)
    assert printable("a\nb\r\nc\td") == "a b c d"
    assert printable("\x1b[31m\u202e") == r"\x1b[31m\u202e"
    cut = " ... 9,900 characters left out ... "
    assert printable("ab" * 5000, 100) == "ab" * 22 + cut + "b" + "ab" * 10


def test_commands_and_notes_print_it(capsys: pytest.CaptureFixture[str]) -> None:
    complain(OSError(f"x{HOSTILE}{'y' * 10**6}"))
    note(f"x{HOSTILE}{'y' * 10**6}")
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(":")[0] for line in lines] == ["error", "note", ""]
    assert all(map(is_safe, lines))


def test_errors_of_the_api_quote_files_safely(tmp_path: Path) -> None:
    """A config's key, a shard's name and a JSON value that hold escape sequences."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": HOSTILE + "z" * 10**6}))
    index = {"weight_map": {"a": f"{HOSTILE}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (load, Checkpoint):
        with pytest.raises(ValueError, match=r"\\x1b\[2J") as caught:
            read(tmp_path)
        assert is_safe(str(caught.value))


def test_the_page_escapes_names() -> None:
    assert escape(f"<b>{HOSTILE}") == "&lt;b&gt;" + printable(HOSTILE)


def test_results_name_folders_and_prompts_safely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's record names its prompt, and a folder from others has any name."""
    name = HOSTILE.translate({0: None, 0xD800: None})
    (tmp_path / "a.txt").write_text("One two three. " * 20)
    folder = str(tmp_path / name)
    given = ["--data", str(tmp_path / "a.txt"), "--workers", "1"]
    assert prepare.main([*given, "--out", folder]) == 0
    assert prepare.main([*given, "--verify", folder]) == 0
    config = TrainConfig(out=folder, sample_prompt=name)
    said = [
        command._next_commands(config),
        command._finished_message(config, ""),
        *capsys.readouterr(),
    ]
    assert "are the text's" in said[2]
    for line in "\n".join(said).split("\n"):
        assert is_safe(line), line
