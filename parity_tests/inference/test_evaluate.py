"""The command evaluate: its output, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_torch import evaluate as evaluation
from llama_torch.inference.perplexity import Measurement
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.tokenizer import Gpt2

from ..backends.torch_model import write_model

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=12)
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, config)
    return folder


def run(model_dir: Path, *flags: object) -> int:
    return evaluation.main(["--ckpt", str(model_dir), "--device", "cpu", *map(str, flags)])


def read_json(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_command_prints_what_it_measured(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("É vero. " * 10, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"t": "one"}\n{"t": "two words"}\n', encoding="utf-8")
    data = ("--data", tmp_path / "a.txt", tmp_path / "b.jsonl", "--text-field", "t")
    assert run(model_dir, *data, "--context", 8, "--stride", 3, "--json") == 0
    found = read_json(capsys.readouterr().out)
    assert found["documents"] == 3
    assert found["bytes"] == 90 + 12
    assert found["tokens"] == sum(
        len(Gpt2().encode(t)) for t in ("É vero. " * 10, "one", "two words")
    )
    assert (found["context"], found["stride"]) == (8, 3)
    assert found["tokens_per_second"] > 0
    assert run(model_dir, *data, "--context", 8, "--stride", 3) == 0
    shown = capsys.readouterr().out
    for text in (
        f"{found['perplexity']:,.3f} per token",
        f"{found['bits_per_byte']:.6f}",
        f"tokens {found['tokens']}, bytes 102, documents 3",
        "window 8, stride 3",
        "<|endoftext|>",
        "tokens/s",
    ):
        assert text in shown


def test_a_text_without_bos_or_eos_says_what_is_not_scored() -> None:
    found = Measurement(8, 4, (), documents=1, bytes=3, tokens=2, nats=1.0, seconds=1.0)
    assert "without its first token, whose bytes count" in evaluation.describe(found, Gpt2())


def test_bad_input_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"some.txt": "some text", "empty.txt": "", "half.jsonl": '{"text": "\\ud800"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name, flags, message in (
        ("some.txt", ("--context", 8, "--stride", 9), "--stride 9 is more than the window of 8"),
        ("some.txt", ("--stride", 13), "--stride 13 is more than the window of 12"),
        ("some.txt", ("--context", 13), "--context 13 is more than the model's 12"),
        ("some.txt", ("--context", -1), "--context must not be negative"),
        ("some.txt", ("--batch-size", 0), "--batch-size must be positive"),
        ("some.txt", ("--batch-size", 2**63), "--batch-size must be below 2^31"),
        ("empty.txt", (), "--data: holds no token to score"),
        ("half.jsonl", (), "half.jsonl: line 1: the text in 'text' is not valid: it holds half of"),
        ("none.txt", (), "none.txt: no file found"),
    ):
        assert run(model_dir, "--data", tmp_path / name, *flags) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
