"""A tokenizer.json is read as GPT-2's where nothing of it changes an id or a text."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama_common.errors import InputError
from llama_torch.tokenizer.gpt2 import END_OF_TEXT, END_OF_TEXT_ID, hf_files
from llama_torch.tokenizer.json_tokenizer import Json
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Gpt2

VOCAB = 60000
SAID = (
    "Hello world",
    "it's  two\n\n blanks 1234",
    " é漢🙂 ",
    "",
    END_OF_TEXT,
    "don't<|endoftext|>X",
)
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
CASE = {"type": "Lowercase"}
DIGITS = {"type": "Digits", "individual_digits": True}
BEFORE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        END_OF_TEXT: {"id": END_OF_TEXT, "ids": [END_OF_TEXT_ID], "tokens": [END_OF_TEXT]}
    },
}
PAD = {"strategy": {"Fixed": 10}, "direction": "Left", "pad_to_multiple_of": None}
PAD |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "!"}
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
OTHER = {"id": END_OF_TEXT_ID + 1, "content": "<|other|>", "special": True, "normalized": False}
OTHER |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
DELETED = "(no such key)"


@cache
def own() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(hf_files()["tokenizer.json"])
    return content


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return GPT-2's file with one key changed, or deleted."""
    content = {**own(), "model": {**own()["model"]}}
    for key in ("pre_tokenizer", "decoder", "added_tokens"):
        content[key] = copy.deepcopy(content[key])
    if path[:2] in (("model", "vocab"), ("model", "merges")):
        content["model"][path[1]] = copy.copy(content["model"][path[1]])
    place = content
    for key in path[:-1]:
        place = place[key]
    if value == DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def write(folder: Path, content: dict[str, Any]) -> Any:
    """Write a tokenizer.json; return the library's tokenizer, which finds no token in a text."""
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return library


def require_same(found: Any, library: Any) -> None:
    """The ids of texts, and the texts of ids, are the library's."""
    is_special = all(t.special for t in library.get_added_tokens_decoder().values())
    for text in SAID if is_special else SAID[:3]:  # else the library finds the token in a text
        ids = found.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == library.decode(ids)
    if END_OF_TEXT in found.special:
        assert found.special[END_OF_TEXT] == library.token_to_id(END_OF_TEXT)


SAME = [
    *((("truncation",), CUT), (("padding",), PAD)),
    *((("post_processor",), BYTES), (("normalizer",), DELETED)),
    *((("pre_tokenizer", "trim_offsets"), True), (("pre_tokenizer", "use_regex"), DELETED)),
    *((("decoder",), BYTES), (("model", "dropout"), 0.0)),
    *((("model", key), None) for key in ("continuing_subword_prefix", "end_of_word_suffix")),
    *((("model", key), True) for key in ("fuse_unk", "byte_fallback")),
    *((("model", key), DELETED) for key in ("type", "ignore_merges", "byte_fallback", "dropout")),
    (("model", "unk_token"), END_OF_TEXT),
    (("model", "vocab", END_OF_TEXT), DELETED),
    *((("added_tokens",), []), (("added_tokens", 0, "normalized"), True)),
]
OTHERS = [
    *((("normalizer",), CASE), (("normalizer",), {"type": "Sequence", "normalizers": [CASE]})),
    *((("pre_tokenizer", "use_regex"), False), (("pre_tokenizer", "add_prefix_space"), True)),
    *((("pre_tokenizer",), DIGITS), (("pre_tokenizer",), None)),
    (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [DIGITS, own()["pre_tokenizer"]]}),
    *((("decoder",), None), (("decoder",), {"type": "Fuse"}), (("post_processor",), BEFORE)),
    *((("model", "dropout"), 1.0), (("model", "ignore_merges"), True)),
    (("model", "end_of_word_suffix"), "</w>"),
    *((("model", "vocab", "!"), 50300), (("model", "merges", 0), ["Ġ", "h"])),
    *((("added_tokens", 0, flag), True) for flag in ("lstrip", "rstrip", "single_word")),
    *(
        (("added_tokens", 0, "special"), False),
        (("added_tokens",), [*own()["added_tokens"], OTHER]),
    ),
]


@pytest.mark.parametrize(("path", "value"), SAME)
def test_what_changes_no_text_is_gpt2s(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    library = write(tmp_path, changed(path, value))
    found = load_tokenizer(tmp_path, VOCAB)
    assert isinstance(found, Gpt2)
    require_same(found, library)


@pytest.mark.parametrize(("path", "value"), OTHERS)
def test_what_may_change_a_text_is_read_by_the_library(
    tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    library = write(tmp_path, changed(path, value))
    found = load_tokenizer(tmp_path, VOCAB)
    assert isinstance(found, Json)
    require_same(found, library)
    assert found.prefix == ((END_OF_TEXT_ID,) if value is BEFORE else ())


def _no_end(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "added_tokens": []}


def _other_id(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "added_tokens": [{**own()["added_tokens"][0], "id": 5}]}


def _two_ids(content: dict[str, Any]) -> dict[str, Any]:
    model = content["model"]
    return {**content, "model": {**model, "vocab": {**model["vocab"], END_OF_TEXT: 50300}}}


@pytest.mark.parametrize("change", [_no_end, _other_id, _two_ids])
def test_an_end_token_with_no_id_or_another(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Left out, GPT-2's other pieces are an encoding of 50,256; an id that cannot be is refused."""
    write(tmp_path, change(changed(("model", "vocab", END_OF_TEXT), DELETED)))
    if change is _no_end:
        found = load_tokenizer(tmp_path, VOCAB)
        assert (type(found), found.n_ids, found.special) == (Json, END_OF_TEXT_ID, {})
        return
    with pytest.raises(InputError, match="cannot have id 5"):
        load_tokenizer(tmp_path, VOCAB)


@pytest.mark.parametrize("has_file", [True, False])
def test_added_tokens_beside_gpt2s(tmp_path: Path, has_file: bool) -> None:
    """The file beside may say GPT-2's own id and no other; more tokens need a tokenizer.json."""
    if has_file:
        write(tmp_path, own())
    beside = tmp_path / "added_tokens.json"
    beside.write_text(json.dumps({END_OF_TEXT: END_OF_TEXT_ID}))
    assert isinstance(load_tokenizer(tmp_path, VOCAB), Gpt2)
    beside.write_text(json.dumps({END_OF_TEXT: 7}))
    with pytest.raises(InputError, match=f"has id 7, and .* {END_OF_TEXT_ID}|adds .* as id 7"):
        load_tokenizer(tmp_path, VOCAB)
    beside.write_text(json.dumps({"<x>": END_OF_TEXT_ID + 1}))
    if has_file:
        assert load_tokenizer(tmp_path, VOCAB).n_ids == END_OF_TEXT_ID + 2
        return
    with pytest.raises(
        InputError, match=r"added_tokens\.json: adds '<x>', as id 50257 .* no tokenizer\.json"
    ):
        load_tokenizer(tmp_path, VOCAB)
