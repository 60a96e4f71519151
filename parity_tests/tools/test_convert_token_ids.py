"""convert.py: config.json and generation_config.json tell which tokens begin and end a text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_parity import convert
from llama_torch import load
from reference_np.config import LlamaConfig

from ..support.llama3_ranks import token_ids
from ..support.meta_checkpoints import (
    CONFIG,
    LLAMA3_SCALING,
    Cut,
    an_hf,
    meta_params,
    meta_tensors,
    write_meta,
)
from ..support.tokenizers import byte_level, sentence_piece, spaced
from .commands import run_convert

LLAMA_2 = {"bos_token_id": 1, "eos_token_id": 2}


def silent(folder: Path, vocab_size: int = 64, **changes: Any) -> Path:
    """Write a checkpoint of Meta's form in which no file tells a special token, as released."""
    config = LlamaConfig(8, 1, 2, 1, 4, 8, vocab_size, **changes)
    tensors = meta_tensors(Cut(config, torch.bfloat16, 1, 0))
    write_meta(folder, meta_params(config), tensors, 1)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "ids"),
    [
        (sentence_piece, LLAMA_2),
        (spaced, LLAMA_2),
        (byte_level, {"bos_token_id": 0, "eos_token_id": 1}),
    ],
)
def test_the_tokenizer_tells_them(
    tmp_path: Path, make: Callable[[Path], Path], ids: dict[str, Any]
) -> None:
    make(silent(tmp_path / "a", 700))
    run_convert(tmp_path / "a", tmp_path / "b")
    assert token_ids(tmp_path / "b") == [ids, ids]
    assert load(tmp_path / "b").end_ids == {ids["eos_token_id"]}


def test_metas_folder_of_a_llama_2_has_its_tokenizer_alone(tmp_path: Path) -> None:
    sentence_piece(silent(tmp_path / "a", 400))
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    run_convert(tmp_path / "a", tmp_path / "b")
    assert token_ids(tmp_path / "b") == [LLAMA_2, LLAMA_2]
    assert load(tmp_path / "b").end_ids == {2}


def test_a_tokenizer_json_with_llama_3s_names_tells_all_its_ends(tmp_path: Path) -> None:
    silent(tmp_path / "a", 500)
    byte_level(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    text = path.read_text()
    renamed = {"<|begin|>": "<|begin_of_text|>", "<|end|>": "<|end_of_text|>"}
    renamed |= {"<|head|>": "<|eot_id|>", "<|/head|>": "<|finetune_right_pad_id|>"}
    for old, new in renamed.items():
        text = text.replace(old, new)
    path.write_text(text)
    (tmp_path / "a" / "tokenizer_config.json").unlink()  # which names BOS and EOS
    run_convert(tmp_path / "a", tmp_path / "b")
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}
    assert token_ids(tmp_path / "b") == [ids, ids]


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    """Null, since readers would take token 1 for a key that is not there."""
    byte_level(silent(tmp_path / "a", 500))
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    run_convert(tmp_path / "a", tmp_path / "b")
    ids = {"bos_token_id": None, "eos_token_id": 1}
    assert token_ids(tmp_path / "b") == [ids, ids]
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (read.bos_token_id, read.eos_token_id) == (None, 1)


@pytest.mark.parametrize(
    ("vocab_size", "changes", "ids"),
    [
        (32_000, {}, LLAMA_2),
        (128_256, {"rope_theta": 5e5}, {"bos_token_id": 128000, "eos_token_id": [128001, 128009]}),
        (
            128_256,
            {"rope_theta": 5e5, "rope_factor": 8.0, **LLAMA3_SCALING},
            {
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128008, 128009],
                "pad_token_id": 128004,
            },
        ),
    ],
)
def test_without_a_tokenizer_the_size_of_a_released_vocabulary_tells_them(
    tmp_path: Path, vocab_size: int, changes: dict[str, Any], ids: dict[str, Any]
) -> None:
    silent(tmp_path / "a", vocab_size, **changes)
    run_convert(tmp_path / "a", tmp_path / "b")
    assert token_ids(tmp_path / "b") == [ids, ids]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.generation_config.eos_token_id == ids["eos_token_id"]
    assert model.generation_config.bos_token_id == ids["bos_token_id"]


def test_flags_tell_them(tmp_path: Path) -> None:
    silent(tmp_path / "a")
    run_convert(tmp_path / "a", tmp_path / "b", "--bos-token-id", 0, "--eos-token-id", 9, 5)
    ids = {"bos_token_id": 0, "eos_token_id": [5, 9]}
    assert token_ids(tmp_path / "b") == [ids, ids]


def test_flags_are_before_files(tmp_path: Path) -> None:
    byte_level(silent(tmp_path / "a", 500))
    run_convert(tmp_path / "a", tmp_path / "b", "--eos-token-id", 7)
    ids = {"bos_token_id": 0, "eos_token_id": 7}
    assert token_ids(tmp_path / "b") == [ids, ids]
    run_convert(tmp_path / "b", tmp_path / "c", "--to", "hf", "--eos-token-id", 8, 9)
    ids = {"bos_token_id": 0, "eos_token_id": [8, 9]}
    assert token_ids(tmp_path / "c") == [ids, ids]


def test_each_file_keeps_what_it_tells(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    config = CONFIG.to_hf() | {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    own = {"eos_token_id": [4, 6], "temperature": 0.5}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(own))
    run_convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    run_convert(tmp_path / "a", tmp_path / "m")
    told = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert told == {"bos_token_id": 3, "pad_token_id": 5, **own}
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == told
    assert token_ids(tmp_path / "b")[0]["eos_token_id"] == 4
    run_convert(tmp_path / "m", tmp_path / "c")
    ids = {"bos_token_id": 3, "eos_token_id": [4, 6], "pad_token_id": 5}
    assert token_ids(tmp_path / "c") == [ids, ids]


def test_an_end_without_a_beginning_is_as_it_was(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"eos_token_id": 4}))
    run_convert(tmp_path / "a", tmp_path / "m")
    run_convert(tmp_path / "m", tmp_path / "b")
    assert token_ids(tmp_path / "b") == [{"eos_token_id": 4}] * 2


def test_hugging_faces_form_may_tell_none(tmp_path: Path) -> None:
    """Its tokenizer is asked; where that tells none either, nothing is written as before."""
    an_hf(tmp_path / "a", LlamaConfig(24, 2, 6, 2, 4, 40, 500))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["bos_token_id"], config["eos_token_id"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    run_convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    byte_level(tmp_path / "a")
    run_convert(tmp_path / "a", tmp_path / "c", "--to", "hf")
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in "bc"]
    assert [content.get("eos_token_id") for content in told] == [None, 1]
    assert [content.get("bos_token_id") for content in told] == [None, 0]


@pytest.mark.parametrize("vocab_size", [32_000, 128_256])
@pytest.mark.parametrize("known", [{}, {"eos_token_id": 7}])
def test_hugging_faces_form_is_told_none_by_its_size(
    tmp_path: Path, vocab_size: int, known: dict[str, Any]
) -> None:
    an_hf(tmp_path / "a", LlamaConfig(8, 1, 2, 1, 4, 8, vocab_size))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["bos_token_id"], config["eos_token_id"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | known))
    run_convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    told = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: value for key, value in told.items() if key.endswith("token_id")} == known
    assert not (tmp_path / "b" / "generation_config.json").exists()


@pytest.mark.parametrize("pad", [-1, 30])
def test_padding_beyond_the_vocabulary_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pad: int
) -> None:
    an_hf(tmp_path / "a")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "a" / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {"eos_token_id": 1, "pad_token_id": pad}))
    run_convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert token_ids(tmp_path / "b") == [{"bos_token_id": 0, "eos_token_id": 1}] * 2
    assert f"config.json: pad_token_id {pad} is no token" in capsys.readouterr().err


def told(**ids: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        silent(folder)
        (folder / "generation_config.json").write_text(json.dumps(ids))
        return folder

    return make


def a_config(**ids: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        an_hf(folder)
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | ids))
        return folder

    return make


def large_tokenizer(folder: Path) -> Path:
    return sentence_piece(silent(folder))


def unnamed(folder: Path) -> Path:
    byte_level(silent(folder, 500))
    (folder / "tokenizer_config.json").unlink()
    return folder


ASKED = "no file tells which token ends a text or begins one; give --eos-token-id and"
BAD: list[tuple[Callable[[Path], Path], str, str]] = [
    (silent, "", f"a: {ASKED} --bos-token-id, or put the checkpoint's tokenizer there"),
    (silent, "--bos-token-id 1", "give --eos-token-id, or"),
    (silent, "--eos-token-id 1", "give --bos-token-id, or"),
    (told(), "", ASKED),
    (told(bos_token_id=1, eos_token_id=[]), "", "give --eos-token-id, or"),
    (unnamed, "", ASKED),
    (large_tokenizer, "", "tokenizer.model: has token id 399, beyond the model's vocabulary of 64"),
    (silent, "--bos-token-id 1 --eos-token-id 3 64", "--eos-token-id 64 is no token of the voc"),
    (silent, "--bos-token-id 64 --eos-token-id 3", "--bos-token-id 64 is no token of the voc"),
    (silent, "--bos-token-id -2", "--bos-token-id must be a token's id, got -2"),
    (silent, "--bos-token-id 1 --eos-token-id -1", "--eos-token-id must be tokens' ids"),
    (silent, "--eos-token-id x", "--eos-token-id"),
    (silent, "--to meta --eos-token-id 3", "--eos-token-id: "),
    (a_config(), "--bos-token-id 3", "--bos-token-id: "),
    (told(eos_token_id=[3, 64]), "", "generation_config.json: eos_token_id 64 is no token"),
    (told(eos_token_id=True), "", "generation_config.json: eos_token_id True is no token"),
    (told(bos_token_id=[1], eos_token_id=3), "", "generation_config.json: bos_token_id is a list"),
    (a_config(eos_token_id=30), "", "config.json: eos_token_id 30 is no token of the vocab"),
    (a_config(bos_token_id="1"), "--to hf", "config.json: bos_token_id '1' is no token"),
]


@pytest.mark.parametrize(("make", "flags", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_cannot_be_honoured_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    flags: str,
    words: str,
) -> None:
    source = make(tmp_path / "a")
    capsys.readouterr()
    assert convert.main([str(source), str(tmp_path / "b"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_tokenizer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent(tmp_path / "a")
    run_convert(tmp_path / "a", tmp_path / "b", "--bos-token-id", 0, "--eos-token-id", 1)
    assert "no tokenizer.json and no tokenizer.model" in capsys.readouterr().out
    byte_level(tmp_path / "b")
    run_convert(tmp_path / "b", tmp_path / "c")
    assert "no tokenizer.model to read text with" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "c")
    sentence_piece(tmp_path / "b")
    run_convert(tmp_path / "b", tmp_path / "c")
    assert "to read text with" not in capsys.readouterr().out
