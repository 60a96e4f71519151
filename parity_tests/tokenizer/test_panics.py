"""Texts that a tokenizer's library fails on: one line that says where, and nothing half-written.

No such text stands here: what panics is a stand-in for the library.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_common import cli
from llama_common.errors import InputError
from llama_parity.comparison.inputs import token_ids
from llama_torch import evaluate, generate, load, prepare
from llama_torch.config import DataConfig, TrainConfig
from llama_torch.data import documents
from llama_torch.data.corpus import load_corpus
from llama_torch.inference import perplexity
from llama_torch.tokenizer import gpt2 as tokenizer
from llama_torch.tokenizer.chat_template import ChatTemplate, Llama2Template
from llama_torch.tokenizer.encoding import GPT2
from llama_torch.tokenizer.gpt2 import gpt2, gpt2_ids, guarded
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training import source
from reference_np.config import LlamaConfig

from ..backends.torch_model import small_model
from ..support.tokenizers import byte_level

BAD = "panics"
SAYS = r"the {} library cannot encode this text \(StackOverflow\); its longest run of blanks has {}"


class PanicException(BaseException):
    """As pyo3 has it, whose own cannot be imported."""


def encode(text: str, **_: Any) -> Any:
    if BAD in text:
        raise PanicException("StackOverflow")
    return gpt2().encode_ordinary(text)


@pytest.fixture
def panicking(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(encode_ordinary=encode, n_vocab=gpt2().n_vocab)
    monkeypatch.setattr(tokenizer, "gpt2", lambda: stand_in)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    counts = "note: --data "  # how many files a folder holds
    [line] = [text for text in captured.err.splitlines() if not text.startswith(counts)]
    assert line.startswith("error: ")
    return line


@pytest.mark.usefixtures("panicking")
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("b.txt", ["One.", "", f"Two {BAD}    ."]),
        ("b.jsonl", ['{"text": "one"}', "", json.dumps({"text": f"two {BAD}    ."})]),
    ],
)
def test_preparation_names_the_file_and_the_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
    name: str,
    lines: list[str],
) -> None:
    monkeypatch.setattr(documents, "PIECE", 20)  # several, so that there are several processes
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("Before.")
    (folder / name).write_text("\n".join(lines))
    files = [str(folder / "a.txt"), str(folder / name)]
    flags = ["--data", *files, "--out", str(out), "--workers", workers]
    said = refused(capsys, prepare.main(flags))
    found = [p.start for p in documents.pieces([folder / name], "text") if BAD in str(p.content)]
    place = "line 3" if name == "b.jsonl" else f"the text from byte {found[0]} on"
    assert re.search(f"{name}: {place}: " + SAYS.format("tiktoken", "4 characters, from"), said)
    assert {path.name for path in out.iterdir()} <= {"lock", "progress.json"}


@pytest.mark.usefixtures("panicking")
def test_training_on_it_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(BAD)
    config = DataConfig(data=(str(tmp_path / "a.md"),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"a\.md: the text from byte 0 on: the tiktoken library"):
        load_corpus(config, 50257, 8)
    with pytest.raises(InputError, match="^--sample-prompt: the tiktoken library"):
        source.TextSource(TrainConfig(sample_prompt=BAD), None, GPT2, None).prompt()


@pytest.mark.usefixtures("panicking")
def test_the_commands_on_a_model_name_the_flag_or_the_document(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = ["--ckpt", str(model_dir)]
    for prompts in ([BAD], ["Hello", BAD]):
        said = refused(capsys, generate.main([*ckpt, "--prompt", *prompts]))
        assert f"--prompt '{BAD}': the tiktoken library" in said
    said = refused(capsys, generate.main([*ckpt, "--prompt", "Hi", "--stop-tokens", BAD]))
    assert f"--stop-tokens '{BAD}': the tiktoken library" in said
    (tmp_path / "a.txt").write_text("Hello.")
    for name, number in (("b.txt", 1), ("c.jsonl", 2)):
        (tmp_path / name).write_text(BAD)
        if name == "c.jsonl":
            (tmp_path / name).write_text('{"text": "one"}\n' + json.dumps({"text": BAD}))
        files = str(tmp_path / "a.txt"), str(tmp_path / name)
        said = refused(capsys, evaluate.main([*ckpt, "--data", *files]))
        assert f"{name}: document {number}: the tiktoken library" in said
    model = load(model_dir)
    with pytest.raises(InputError, match="^--data: document 2: the tiktoken library"):
        perplexity.evaluate(model.model, model.tokenizer, ["Hello.", BAD])


@pytest.mark.usefixtures("panicking")
def test_a_comparison_names_the_flag(tmp_path: Path) -> None:
    config = LlamaConfig(16, 1, 2, 1, 8, 24, 50257)
    (tmp_path / "a.txt").write_text(BAD)
    for given_ in ({"prompt": BAD, "file": ""}, {"prompt": "", "file": str(tmp_path / "a.txt")}):
        flag = "--prompt" if given_["prompt"] else r"--file .*a\.txt"
        with pytest.raises(InputError, match=f"^{flag}: the tiktoken library"):
            token_ids(config, **given_, ids=(), limit=8)


def test_a_conversation_is_refused_and_another_goes_on(tmp_path: Path) -> None:
    """Through the tokenizers library, whose own patterns may overflow."""
    chats = load_tokenizer(byte_level(tmp_path), 700)
    real = chats.tokenizer  # type: ignore[attr-defined]

    def either(text: str, **settings: Any) -> Any:
        return encode(text) if BAD in text else real.encode(text, **settings)

    chats.tokenizer = SimpleNamespace(encode=either)  # type: ignore[attr-defined]
    for template in (
        ChatTemplate("{{ messages[0].content }}", "here", chats),
        Llama2Template(chats),
    ):
        with pytest.raises(InputError, match="^the conversation: the tokenizers library"):
            template.encode([{"role": "user", "content": BAD}])
        assert template.encode([{"role": "user", "content": "Hello"}])


def test_a_tokenizer_that_panics_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(_: str) -> None:
        raise PanicException("of an\nunknown kind")

    byte_level(tmp_path)
    stand_in = SimpleNamespace(Tokenizer=SimpleNamespace(from_str=panic))
    monkeypatch.setattr("llama_torch.tokenizer.json_tokenizer.import_library", lambda *_: stand_in)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer .*of an unknown kind"):
        load_tokenizer(tmp_path, 700)


def test_a_tokenizer_that_panics_after_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its anchors are added, and where ids are decoded."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("late")

    chats = load_tokenizer(byte_level(tmp_path), 700)
    chats.tokenizer = SimpleNamespace(decode=panic)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"its decoder fails \(the tokenizers library fails"):
        chats.decode([65])
    monkeypatch.setattr("llama_torch.tokenizer.json_tokenizer.Json._add_anchors", panic)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer \(the tokenizers "):
        load_tokenizer(tmp_path, 700)


def test_a_command_whose_library_panics_prints_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        raise PanicException("of an\nunknown kind")

    assert cli.run(main) == 2
    assert capsys.readouterr().err == (
        "error: a library failed on a file that it was given (of an unknown kind)\n"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_nothing_else_is_held_for_a_panic(error: type[BaseException]) -> None:
    with pytest.raises(error), guarded("tiktoken", ""):
        raise error


BLANKS = " \n\t\r\x0b\x0c\x1c\x1f\x85\u00a0\u2003\u3000"
runs = st.text(BLANKS, max_size=9) | st.text("ab'sl1.é中😀\u0301", min_size=1, max_size=3)


@given(text=st.lists(runs, max_size=9).map("".join), long=st.integers(1, 4))
@example("a" + " " * 9 + "b", 3)
@example("a\u3000\u3000\u3000\u3000b", 2)
@example("a" + " " * 9 + "\x1cb", 3)
@example("  \n\n  's \n \n l\r\n\r\n\r\n1", 1)
@example(" " * 9, 2)
def test_a_long_run_of_blanks_is_cut_where_the_ids_stay(text: str, long: int) -> None:
    whole = gpt2().encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONG", long)
        parts = tokenizer._cut_long_runs(text)
        assert gpt2_ids(text) == whole
    assert "".join(parts) == text
    for part in parts:  # none has a run that would be long before what follows
        assert not re.search(f"{tokenizer.BLANK}{{{long + 1}}}(?!{tokenizer.BLANK}|$)", part), parts
