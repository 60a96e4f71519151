"""The tokenizer on the way into a GGUF file and back: the same ids, or a note."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_parity import convert
from llama_parity.conversion.gguf_file import GgufFile
from llama_parity.conversion.gguf_tokenizer import PRE
from llama_torch.tokenizer.loading import load_tokenizer
from reference_np.config import LlamaConfig

from ..conformance.strategies import random_params
from ..support import tokenizers as made
from ..support.llama3_ranks import a_llama3, gpt2_ranks
from ..support.meta_checkpoints import write_hf
from .commands import run_convert
from .gguf_files import ChangedKeys, write_vocabulary

gguf = pytest.importorskip("gguf")

SAID = [
    "The llama walks  over\n\n 1234 'll don't",
    " é漢字 🙂\u200d🙂",
    "<s> </s> <|begin|>",
    "",
    "  a",
]


def a_model(folder: Path, kind: str, vocab_size: int) -> LlamaConfig:
    """Write a model of that vocabulary and a tokenizer of one of the kinds."""
    config = LlamaConfig(4, 1, 1, 1, 4, 4, vocab_size, max_seq_len=64)
    params = random_params(config, 0)
    write_hf(folder, config, {n: torch.from_numpy(x).float() for n, x in params.items()}, 1)
    made.KINDS[kind](folder)
    return config


@pytest.mark.parametrize(
    ("kind", "vocab_size", "model", "pre"),
    [
        ("gpt2", 50304, "gpt2", "gpt-2"),
        ("bytes", 510, "gpt2", "gpt-2"),
        ("pieces", 405, "llama", "default"),
    ],
)
def test_ids_and_texts_come_back(
    tmp_path: Path, kind: str, vocab_size: int, model: str, pre: str
) -> None:
    source = tmp_path / "a"
    a_model(source, kind, vocab_size)
    run_convert(source, tmp_path / "b.gguf")
    said = GgufFile(tmp_path / "b.gguf").metadata
    keys = gguf.Keys.Tokenizer
    assert (said[keys.MODEL], said[keys.PRE]) == (model, pre)
    assert len(said[keys.LIST]) == len(said[keys.TOKEN_TYPE]) == vocab_size
    run_convert(tmp_path / "b.gguf", tmp_path / "c")
    before, after = (load_tokenizer(tmp_path / name, vocab_size) for name in "ac")
    assert (before.prefix, before.bos, before.eos) == (after.prefix, after.bos, after.eos)
    assert said[keys.ADD_BOS] == bool(before.prefix)
    assert said[keys.BOS_ID] == before.special[before.bos]
    assert said[keys.EOS_ID] == before.special[before.eos]
    for text in [*SAID, *made.TEXT[:5]]:
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == before.decode(ids)
    for name, id_ in before.special.items():
        assert said[keys.LIST][id_] == name
        assert after.special[name] == id_
    settings = [json.loads((tmp_path / n / "tokenizer_config.json").read_text()) for n in "ac"]
    assert settings[0].get("chat_template") == settings[1].get("chat_template")
    ids = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert before.special[before.eos] in np.atleast_1d(ids["eos_token_id"])


@pytest.mark.parametrize("is_31", [False, True])
def test_llama_3_comes_back(tmp_path: Path, is_31: bool) -> None:
    a_llama3(tmp_path / "a", gpt2_ranks(), is_31)
    run_convert(tmp_path / "a", tmp_path / "b")
    run_convert(tmp_path / "b", tmp_path / "c.gguf")
    said = GgufFile(tmp_path / "c.gguf").metadata
    assert said[gguf.Keys.Tokenizer.PRE] == "llama-bpe"
    assert said[gguf.Keys.Tokenizer.ADD_BOS]
    run_convert(tmp_path / "c.gguf", tmp_path / "d")
    before, after = (json.loads((tmp_path / n / "tokenizer.json").read_text()) for n in "bd")
    decoder = before.pop("decoder"), after.pop("decoder")
    assert decoder[0]["type"] == decoder[1]["type"] == "ByteLevel"
    before["post_processor"] = before["post_processor"]["processors"][1]
    assert before == after
    configs = [json.loads((tmp_path / n / "generation_config.json").read_text()) for n in "bd"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["spaced"])
def test_what_llama_cpp_does_not_have_is_noted(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a"
    a_model(source, kind, 700)
    run_convert(source, tmp_path / "b.gguf")
    assert "no tokenizer is written" in capsys.readouterr().err
    assert GgufFile(tmp_path / "b.gguf").metadata["tokenizer.ggml.model"] == "none"
    run_convert(tmp_path / "b.gguf", tmp_path / "c")
    assert not (tmp_path / "c" / "tokenizer.json").exists()
    tokenizer = load_tokenizer(source, 700)
    ids = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert tokenizer.special[tokenizer.eos] in np.atleast_1d(ids["eos_token_id"])


@pytest.mark.parametrize("eos", [3, [2, 3, 5]])
def test_ids_without_a_tokenizer_come_back(tmp_path: Path, eos: int | list[int]) -> None:
    config = LlamaConfig(4, 1, 1, 1, 4, 4, 7, max_seq_len=64)
    tensors = {n: torch.from_numpy(x).float() for n, x in random_params(config, 0).items()}
    write_hf(tmp_path / "a", config, tensors, 1)
    told = {"bos_token_id": 1, "eos_token_id": eos, "pad_token_id": 0}
    keys = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(keys | told))
    run_convert(tmp_path / "a", tmp_path / "b.gguf")
    run_convert(tmp_path / "b.gguf", tmp_path / "c")
    for name in ("generation_config.json", "config.json"):
        found = json.loads((tmp_path / "c" / name).read_text())
        assert told == {key: found[key] for key in told}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": ["a"]}, "tokens has 1 entries; 4 are needed"),
        ({"tokens": [1, 2, 3, 4]}, "tokens is a list of integers; a list of strings is needed"),
        ({"token_type": [1, 1]}, "token_type has 2 entries; 4 are needed"),
        ({"token_type": ["a"] * 4}, "token_type is a list of strings; a list of integers"),
        ({"token_type": [math.nan] * 4}, "token_type is a list of floats; a list of integers"),
        ({"bos_token_id": 4}, "bos_token_id 4 is no token of the vocabulary of 4; give --bos"),
        ({"eot_token_id": 4}, "eot_token_id 4 is no token of the vocabulary of 4; give --eos"),
        ({"model": "llama", "scores": [0.5]}, "scores has 1 entries; 4 are needed"),
        ({"model": "llama", "scores": [1] * 4}, "scores is a list of integers; a list of floats"),
        ({"model": [1, 2]}, "model is a list of integers; a string is needed"),
        ({"pre": 3}, "pre is 3; a string is needed"),
        ({"merges": [1]}, "merges is a list of integers; a list of strings is needed"),
        ({"add_bos_token": [1, 2]}, "add_bos_token is a list of integers; true or false is needed"),
        ({"add_bos_token": "false"}, "add_bos_token is 'false'; true or false is needed"),
        ({"add_eos_token": 1}, "add_eos_token is 1; true or false is needed"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 4), **changed)
    assert convert.main([str(path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: tokenizer.ggml.")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 4), pre="qwen2")
    run_convert(path, tmp_path / "out")
    assert "its tokenizer ('gpt2', 'qwen2') is not carried over" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model": "llama"}, "'llama', without tokenizer.ggml.scores"),
        ({"tokens": ["a", "b", "a", "c"]}, "'gpt2', with a token that stands there twice"),
        ({"merges": ["a c"]}, "'gpt2', with the merge 'a c' of or into no token"),
        ({"merges": ["a"]}, "'gpt2', with the merge 'a' of or into no token"),
        ({"model": "llama", "scores": [0.5] * 4, "tokens": ["a", "", "b", "c"]}, "an empty token"),
        ({"model": "llama", "scores": [0.5] * 4, "token_type": [2, 2, 1, 1]}, "several unknown"),
        ({"model": "llama", "scores": [0.5] * 4}, "several unknown tokens, or none"),
        (
            {"model": "llama", "scores": [0.5] * 4, "tokens": BYTES[:4], "token_type": [6] * 4},
            "with some of the 256 tokens for bytes alone",
        ),
    ],
)
def test_a_tokenizer_that_no_other_form_holds_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], what: str
) -> None:
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 4), **changed)
    run_convert(path, tmp_path / "out")
    err = capsys.readouterr().err
    assert err.startswith(f"note: {path}: its tokenizer (")
    assert what in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("kinds", [[2, 3, 3, 1, 1, 1], [2, 3, 3, 0, 99, -1]])
@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0, -1.0, -2.0, -3.0], [math.nan] * 6])
def test_pieces_without_bytes_and_of_odd_kinds_are_ones_that_sentencepiece_loads(
    tmp_path: Path, kinds: list[int], scores: list[float]
) -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b"]
    changed = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 6), **changed)
    run_convert(path, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out", 6)
    assert tokenizer.encode("ab") == [3, 4, 5]


@pytest.mark.parametrize("id_", [4, -1, 2**32 - 1])
def test_padding_beyond_the_vocabulary_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], id_: int
) -> None:
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 4), eos_token_id=2)
    padded = ChangedKeys(path).write(tmp_path / "p.gguf", {"tokenizer.ggml.padding_token_id": id_})
    run_convert(padded, tmp_path / "out")
    err = capsys.readouterr().err
    assert f"padding_token_id {id_} is no token of the vocabulary of 4, and is left out" in err
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids == {"eos_token_id": 2}


def test_flags_stand_for_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    beyond = {"bos_token_id": 4, "eos_token_id": 5, "eot_token_id": 6}
    path = write_vocabulary(tmp_path / "m.gguf", LlamaConfig(4, 1, 1, 1, 4, 4, 4), **beyond)
    run_convert(path, tmp_path / "out", "--bos-token-id", 2, "--eos-token-id", 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)


def test_the_names_are_ggmls() -> None:
    keys = gguf.Keys.Tokenizer
    ids = [keys.BOS_ID, keys.EOS_ID, keys.EOT_ID, keys.EOM_ID, keys.UNK_ID, keys.PAD_ID]
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    assert ids == [f"tokenizer.ggml.{name}_token_id" for name in names]
    assert keys.CHAT_TEMPLATE == "tokenizer.chat_template"
    assert keys.ADD_PREFIX == "tokenizer.ggml.add_space_prefix"
    assert keys.SCORES == "tokenizer.ggml.scores"
    assert keys.MERGES == "tokenizer.ggml.merges"
    assert "gpt-2" in PRE


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    """Not run where llama_cpp is not installed, which compiles for 20 minutes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from reference_np.checkpoint import Checkpoint
    from reference_np.model import forward

    source = tmp_path / "a"
    config = a_model(source, "pieces", 405)
    run_convert(source, tmp_path / "b.gguf")
    # Its cache is float16 by default, which errs by 2e-3 here.
    whole = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(
        str(tmp_path / "b.gguf"), n_ctx=64, logits_all=True, verbose=False, **whole
    )
    tokens = [1, *range(5, 25)]
    model.eval(tokens)
    theirs = np.array(model.scores[: len(tokens)], np.float64)
    params = Checkpoint(source, np.float64)
    ours = forward(params, np.array([tokens]), params.config)[0][0]
    ours, theirs = (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
        for x in (ours, theirs)
    )
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5)
    tokenizer = load_tokenizer(source, config.vocab_size)
    for text in SAID:
        assert model.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
