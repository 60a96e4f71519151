"""The carried GPT-2 encoding, and the Hugging Face files that must encode the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer import gpt2


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in gpt2.hf_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(ModelConfig().to_hf()))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_known_ids() -> None:
    """Facts of GPT-2, known from outside this project."""
    encoding = gpt2.gpt2()
    assert encoding.n_vocab == 50257
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert 50256 not in encoding.encode_ordinary("<|endoftext|>")


pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["'ll", "  ", "\n\n", " \t ", "1234", "…", "é漢字", "🙂\u200d🙂", "\u00a0", "İ"]
    ),
)


@given(parts=st.lists(pieces, max_size=8))
@example(parts=["I've 'VE  \n\n  don't", " \u3000x", "\x00\x7f\x85"])
def test_hugging_face_encodes_exactly_as_tiktoken(hugging_face: Any, parts: list[str]) -> None:
    text = "".join(parts)
    ids = gpt2.gpt2().encode(text, allowed_special="all")
    assert hugging_face(text).input_ids == ids
    assert hugging_face.decode(ids) == text


def test_special_token_agrees(hugging_face: Any) -> None:
    assert hugging_face.eos_token_id == hugging_face.bos_token_id == 50256
    assert hugging_face("a<|endoftext|>b").input_ids == [64, 50256, 65]


def test_damaged_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.setattr(gpt2.resources, "files", lambda package: tmp_path)
    with pytest.raises(InputError, match="gpt2.tiktoken: sha256 is"):
        gpt2._ranks()
