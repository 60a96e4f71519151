"""Tokenizers: as their libraries have it, with special tokens that no text can spell."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from llama_common.errors import InputError
from llama_torch.inference.generation_file import end_ids
from llama_torch.tokenizer.json_tokenizer import Json
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.pieces import SentencePiece
from llama_torch.tokenizer.tokenizer import Gpt2, Tokenizer

from ..support.tokenizers import KINDS, texts

VOCAB = 50257


def test_the_directory_decides(tokenizers: dict[str, Tokenizer]) -> None:
    kinds = {"gpt2": Gpt2, "bytes": Json, "spaced": Json, "pieces": SentencePiece}
    assert {name: type(tokenizer) for name, tokenizer in tokenizers.items()} == kinds


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "spaced"])
@given(text=texts)
def test_hugging_face_encodes_the_same(
    tokenizers: dict[str, Tokenizer], theirs: dict[str, Any], kind: str, text: str
) -> None:
    """Their tokenizer told to leave special tokens in the text alone, and one BOS before it."""
    tokenizer = tokenizers[kind]
    found = [*tokenizer.prefix, *tokenizer.encode(text)]
    assert found == theirs[kind](text, split_special_tokens=True).input_ids


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_text_comes_back_and_spells_no_special_token(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    if kind in ("gpt2", "bytes") or "\u2581" not in text:  # the others' sign for a space
        assert tokenizer.decode([*tokenizer.prefix, *ids]) == text


def test_one_bos_and_never_two(tokenizers: dict[str, Tokenizer]) -> None:
    for kind, bos in (("bytes", "<|begin|>"), ("spaced", "<s>"), ("pieces", "<s>")):
        tokenizer = tokenizers[kind]
        assert tokenizer.prefix == (tokenizer.special[bos],)
        assert tokenizer.special[bos] not in tokenizer.encode(bos + "Hello")
    assert tokenizers["gpt2"].prefix == ()


def test_end_tokens_and_their_places(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bytes"], tmp_path / "copy")
    tokenizer = load_tokenizer(folder, VOCAB)
    assert end_ids(folder, tokenizer, VOCAB) == {tokenizer.special["<|end|>"]}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert end_ids(folder, tokenizer, VOCAB) == {1, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_ids(folder, tokenizer, VOCAB) == {1, 7, 9}
    for wrong in ("[7, 50257]", "-1", '"7"'):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
            end_ids(folder, tokenizer, VOCAB)


def test_a_renamed_end_token_ends_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["pieces"], tmp_path / "copy")
    renamed = {"2": {"content": "<end>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": renamed}))
    tokenizer = load_tokenizer(folder, VOCAB)
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "<end>")
    assert end_ids(folder, tokenizer, VOCAB) == {2}


def test_stop_tokens_are_single_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["bytes"].token_id("<|end|>", "--stop-tokens") == 1
    assert tokenizers["gpt2"].token_id("\n", "--stop-tokens") == 198
    with pytest.raises(InputError, match="--stop-tokens '<|nope|>' is .* tokens and no special"):
        tokenizers["bytes"].token_id("<|nope|>", "--stop-tokens")


def changed(folder: Path, name: str, **change: Any) -> Path:
    """Change some keys of a JSON file."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | change))
    return folder


def test_whether_bos_goes_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer.json says it itself; beside a tokenizer.model the settings do."""
    transformers = pytest.importorskip("transformers")
    for kind in ("bytes", "pieces"):
        shutil.copytree(folders[kind], tmp_path / kind)
        changed(tmp_path / kind, "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(tmp_path / "pieces", VOCAB).prefix == ()
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "bytes")
    tokenizer = load_tokenizer(tmp_path / "bytes", VOCAB)
    assert [*tokenizer.prefix, *tokenizer.encode("Hi")] == peer("Hi").input_ids


def test_what_trained_the_tokenizer_neither_cuts_nor_pads(
    folders: dict[str, Path], tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    folder = shutil.copytree(folders["bytes"], tmp_path / "copy")
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 10}, "direction": "Left", "pad_to_multiple_of": None}
    pad |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|end|>"}
    changed(folder, "tokenizer.json", truncation=cut, padding=pad)
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.encode("Hello world and more") == tokenizers["bytes"].encode(
        "Hello world and more"
    )
    assert tokenizer.prefix == (0,)


def test_gpt2s_vocabulary_with_other_merges_is_another_encoding(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "copy")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder, "tokenizer.json", model=model | {"merges": model["merges"][:1000]})
    assert load_tokenizer(folder, VOCAB).encode("Hello world") == [39, 695, 78, 995]
    changed(
        folder, "tokenizer.json", model=model | {"merges": [" ".join(m) for m in model["merges"]]}
    )
    assert isinstance(load_tokenizer(folder, VOCAB), Gpt2)


def test_an_end_token_that_is_not_called_special(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bytes"], tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    kept = [token for token in content["added_tokens"] if token["content"] != "<|end|>"]
    changed(folder, "tokenizer.json", added_tokens=kept)
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.special["<|end|>"] == 1
    assert 1 not in tokenizer.encode("<|end|>")
    assert end_ids(folder, tokenizer, VOCAB) == {1}
    changed(folder, "tokenizer_config.json", bos_token="", eos_token=None)
    assert load_tokenizer(folder, VOCAB).bos is None


def damaged(folder: Path, name: str, text: str | None) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("kind", "name", "text", "vocab", "message"),
    [
        ("bytes", "tokenizer.json", "{}", VOCAB, "tokenizer.json: not a tokenizer"),
        ("bytes", "tokenizer.json", '{"model": 1, "added_tokens": []}', VOCAB, "not a tokenizer"),
        ("bytes", "tokenizer.json", "[", VOCAB, "is not JSON"),
        ("bytes", "tokenizer.json", None, 500, "holds no tokenizer.json and no tokenizer.model"),
        ("bytes", "x", "", 499, r"has token id 499, beyond the model's vocabulary of 499"),
        ("pieces", "x", "", 300, "has token id 399, beyond"),
        ("pieces", "tokenizer.model", "IQ== 0\n", VOCAB, "not a SentencePiece model but Llama 3's"),
        ("pieces", "tokenizer.model", "\nIQ== 0\n", VOCAB, "not a SentencePiece model; put"),
        ("pieces", "tokenizer.model", "", VOCAB, "not a SentencePiece model; put"),
        ("gpt2", "x", "", 50256, "has token id 50256, beyond"),
        (
            "bytes",
            "tokenizer_config.json",
            '{"eos_token": "<|nope|>"}',
            VOCAB,
            "eos_token is '<|nope",
        ),
        (
            "pieces",
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"400": {"content": "new", "special": false}}}',
            VOCAB,
            "adds 'new', an ordinary token",
        ),
    ],
)
def test_wrong_files_are_one_clear_line(
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    name: str,
    text: str | None,
    vocab: int,
    message: str,
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "copy")
    damaged(folder, name, text)
    with pytest.raises(InputError, match=message.replace("|", r"\|")) as caught:
        load_tokenizer(folder, vocab)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "library"), [("bytes", "tokenizers"), ("pieces", "sentencepiece")]
)
def test_an_absent_library_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"pip install 'llama-parity\[{library}\]'"):
        load_tokenizer(folders[kind], VOCAB)
