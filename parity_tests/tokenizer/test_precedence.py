"""Which of the files beside a tokenizer decides, and what no prompt has, as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from llama_common.errors import InputError
from llama_common.files import write_json
from llama_torch.tokenizer.loading import load_tokenizer

from ..support.tokenizers import write_json_tokenizer

VOCAB = 999
MORE = ("<a>", "<b>")


def write_tokenizer(folder: Path, template: str = "$A") -> None:
    """Write a tokenizer of bytes with two more special tokens and a post-processor."""
    write_json_tokenizer(folder, MORE)
    path = str(folder / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(path)
    made.add_special_tokens(list(MORE))
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(path)


@pytest.mark.parametrize("has_decoder", [False, True])
def test_the_map_replaces_names_where_no_token_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_decoder: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if has_decoder:
        token = {"content": "<s>", "special": True}
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        settings["added_tokens_decoder"] = {"0": token | flags}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<a>", "eos_token": "<b>"})
    ours = load_tokenizer(tmp_path, VOCAB)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert [f"{ours.bos!r} is taken" in line for line in lines] == [True, False]
    assert f"{ours.eos!r} is taken" in lines[1]
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": ours.bos, "eos_token": ours.eos})
    settings |= {"bos_token": ours.bos, "eos_token": ours.eos}
    write_json(tmp_path / "tokenizer_config.json", settings)
    load_tokenizer(tmp_path, VOCAB)
    assert capsys.readouterr().err == ""
    assert (ours.bos, ours.eos) == (theirs.bos_token, theirs.eos_token)
    assert ours.bos == ("<s>" if has_decoder else "<a>")


@pytest.mark.parametrize(("template", "said"), [("$A", False), ("<s> $A </s>", True)])
def test_a_token_after_a_text_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, said: bool
) -> None:
    write_tokenizer(tmp_path, template)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    assert ("a token after a text is left out" in capsys.readouterr().err) == said
    assert 1 not in [*tokenizer.prefix, *tokenizer.encode("hi")]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("post_processor", {"type": "Sequence", "processors": 0}),
        ("post_processor", {"type": "TemplateProcessing", "single": 1}),
        ("post_processor", {"type": "TemplateProcessing", "single": [5]}),
        ("post_processor", {"type": "TemplateProcessing", "single": {"a": 1}}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": 5}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": []}),
        ("normalizer", {"type": "Sequence", "normalizers": True}),
    ],
)
def test_a_step_that_is_none_is_refused_by_file(tmp_path: Path, part: str, value: object) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", content | {part: value})
    for kind in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": kind}
        write_json(tmp_path / "tokenizer_config.json", settings | {"add_prefix_space": False})
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
            load_tokenizer(tmp_path, VOCAB)


def test_add_eos_token_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    write_json(tmp_path / "tokenizer_config.json", settings)
    load_tokenizer(tmp_path, VOCAB)
    assert "add_eos_token is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["vocab_size", "suffix_first", "merges_file", "init_inputs"])
def test_keys_that_saved_tokenizers_have_are_taken(tmp_path: Path, key: str) -> None:
    """SmolLM2's file has its vocabulary's size, CodeLlama's as transformers saves it another."""
    values = {"vocab_size": 49152, "suffix_first": False, "merges_file": "x", "init_inputs": []}
    write_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {key: values[key]})
    load_tokenizer(tmp_path, VOCAB)
