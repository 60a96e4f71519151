"""Names that no file can have, too long or with a zero byte: an InputError, never an OSError."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_parity import compare, convert
from llama_parity.comparison.trace_file import TraceFile
from llama_torch import InputError, evaluate, generate, load
from llama_torch.config import DataConfig
from llama_torch.data.corpus import load_corpus
from llama_torch.data.shards import TokenShards
from llama_torch.data.text_files import find_files, identify
from llama_torch.tokenizer.chat_template import load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Gpt2
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError as OracleInputError

from ..backends.torch_model import small_model

NAMES = ["x" * 300, "x/" * 3000, "a\0b", "a\ud800b", "x" * 300 + "*"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def corpus(data: str, cache: str) -> object:
    return load_corpus(DataConfig(data=(data,) if data else (), cache_dir=cache), 50257, 8)


READERS: dict[str, Callable[[Path], object]] = {
    "load": load,
    "load, as a text": lambda path: load(str(path)),
    "Checkpoint": Checkpoint,
    "TraceFile": TraceFile,
    "load_tokenizer": lambda path: load_tokenizer(path, 50257),
    "load_chat_template": lambda path: load_chat_template(path, Gpt2()),
    "a template": lambda path: load_chat_template(path.parent, Gpt2(), str(path)),
    "find_files": lambda path: find_files([str(path)]),
    "identify": lambda path: identify([path.with_name(path.name + ".txt")], "text"),
    "TokenShards": TokenShards,
    "load_corpus": lambda path: corpus(str(path), str(path.parent)),
    "the cache": lambda path: corpus("", str(path / "")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES, ids=["long", "deep", "zero", "surrogate", "glob"])
def test_a_reader_refuses_it(tmp_path: Path, reader: str, name: str) -> None:
    with pytest.raises((InputError, OracleInputError)) as error:
        READERS[reader](tmp_path / name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [*NAMES[:1], "y/" * 300])
def test_an_index_that_names_such_a_file_is_refused(ckpt: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text((ckpt / "config.json").read_text())
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (load, Checkpoint):
        with pytest.raises((InputError, OracleInputError)):
            read(tmp_path)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[1]])
def test_the_commands_print_one_line(
    ckpt: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = str(ckpt / "model.safetensors"), str(tmp_path / name)
    for main, argv in (
        (generate.main, ["--ckpt", path, "--prompt", "a"]),
        (evaluate.main, ["--ckpt", str(ckpt), "--data", path]),
        (compare.main, [path]),
        (compare.main, [model, "--against", path]),
        (compare.main, [model, "--file", path]),
        (compare.main, [model, "--html", path]),
        (convert.main, [path, str(tmp_path / "out")]),
        (convert.main, [str(ckpt), path]),
    ):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_an_empty_name_is_told_as_one(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell's variable is that was never set."""
    for main, argv, message in (
        (generate.main, ["--ckpt", "", "--prompt", "a"], "--ckpt must name a model directory"),
        (evaluate.main, ["--ckpt", ""], "--ckpt must name a model directory"),
        (compare.main, [""], "'' names no checkpoint; give a"),
        (convert.main, ["", "out"], "SRC '' names nothing; give a"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="--ckpt must name a model directory"):
        load("")
