"""Flags that the files beside a tokenizer give its tokens, and the space before text."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llama_common.errors import InputError
from llama_common.files import write_json
from llama_common.notes import note
from llama_torch.tokenizer.chat_template import load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer

from ..support.tokenizer_folders import (
    IS_V4,
    SAYING,
    VOCAB,
    flagged,
    our_ids,
    settings,
    their_ids,
    transformers,
    write_spaced,
)
from ..support.tokenizers import LETTERS, pieces_model, turns

NAMES = ("<|a|>", "<|b|>", "[X]")
SAID = ("hi", "hi  there ", "", "x y ", "a_b", "\n", "\nthe \n", "\u00a0x\u2003", "\x1cx")
booleans = st.booleans()
said = st.lists(st.sampled_from([*SAID, "  hi "]), min_size=1, max_size=3)
model_file = cache(pieces_model)


def write_bytes(folder: Path, added: list[dict[str, Any]], prefix_space: bool = False) -> None:
    """Write a tokenizer.json of bytes, whose first tokens are ``added``."""
    names = [token["content"] for token in added]
    made = tokenizers.Tokenizer(models.BPE({n: i for i, n in enumerate([*names, *LETTERS])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    content = json.loads(made.to_str())
    content["added_tokens"] = [{"id": i, **token} for i, token in enumerate(added)]
    write_json(folder / "tokenizer.json", content)


@st.composite
def tokens(draw: st.DrawFn, *names: str) -> list[dict[str, Any]]:
    """Draw the flags of tokens of some names."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return [flagged(name, **{flag: draw(booleans) for flag in flags}) for name in names]


def template(order: list[str]) -> str:
    return "{% for m in messages %}" + "{{ m['content'] }}".join([*order, ""]) + "{% endfor %}"


orders = st.permutations(NAMES).map(template)


@given(
    inside=tokens("<s>", "</s>", *NAMES),
    beside=st.one_of(st.none(), tokens("<s>", "</s>", *NAMES)),
    source=orders,
    texts=said,
    kind=st.sampled_from(["PreTrainedTokenizerFast", "GPT2Tokenizer"]),
    in_file=booleans,
    wanted=st.sampled_from([None, True, False]),
)
def test_flags_and_spaces_beside_a_tokenizer_json(
    inside: list[dict[str, Any]],
    beside: list[dict[str, Any]] | None,
    source: str,
    texts: list[str],
    kind: str,
    in_file: bool,
    wanted: bool | None,
) -> None:
    if IS_V4 and kind.startswith("Pre"):
        in_file = bool(wanted)  # where they differ version 4 follows the key
    given_ = settings(source, kind, add_prefix_space=wanted)
    del given_["unk_token"], given_["legacy"]
    if beside is not None:
        given_["added_tokens_decoder"] = {str(i): token for i, token in enumerate(beside)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bytes(folder, inside, in_file)
        write_json(
            folder / "tokenizer_config.json", {k: v for k, v in given_.items() if v is not None}
        )
        assert our_ids(folder, turns(texts)) == their_ids(folder, turns(texts))


# Before text that begins with a space sentencepiece, and so we, put another; transformers 5 none.
@given(
    flags=tokens(*NAMES),
    source=orders,
    texts=st.lists(st.sampled_from([t for t in SAID if t[:1] != "\x1c"]), min_size=1, max_size=3),
    legacy=booleans,
)
def test_flags_beside_a_tokenizer_model(
    flags: list[dict[str, Any]], source: str, texts: list[str], legacy: bool
) -> None:
    proto = model_file((), ("<|a|>", "<|b|>"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = [*map(pieces.piece_to_id, ["<unk>", "<s>", "</s>", *NAMES[:2]]), len(pieces)]
    listed = [*map(flagged, ["<unk>", "<s>", "</s>"]), *({**t, "normalized": False} for t in flags)]
    decoder = {str(i): token for i, token in zip(ids, listed, strict=True)}
    given_ = settings(source, added_tokens_decoder=decoder) | {"legacy": legacy}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(proto)
        write_json(folder / "tokenizer_config.json", given_)
        assert our_ids(folder, turns(texts)) == their_ids(folder, turns(texts))


@pytest.mark.skipif(IS_V4, reason="version 4 needs the tokenizer.model as well")
@given(texts=said, wanted=booleans, legacy=booleans)
def test_spaces_beside_a_tokenizer_json_of_llama(
    texts: list[str], wanted: bool, legacy: bool
) -> None:
    given_ = settings(SAYING, add_prefix_space=wanted) | {"legacy": legacy}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_spaced(folder)
        write_json(folder / "tokenizer_config.json", given_)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert our_ids(folder, turns(texts)) == their_ids(folder, turns(texts))
        ours = load_tokenizer(folder, VOCAB)
        ids = theirs.encode("a b", add_special_tokens=False)
        assert ours.encode("a b") == ids
        assert ours.decode(ids) == theirs.decode(ids)


LISTED = {"additional_special_tokens": [flagged("<|a|>", rstrip=True), flagged("[X]", lstrip=True)]}


def test_flags_of_listed_tokens(tmp_path: Path) -> None:
    write_bytes(tmp_path, [flagged("<s>"), flagged("</s>")])
    listed = [{"__type": "AddedToken", **token} for token in LISTED["additional_special_tokens"]]
    source = "{{ '<|a|>' + messages[0]['content'] + '[X]' }}"
    given_ = settings(source, "PreTrainedTokenizerFast", additional_special_tokens=listed)
    del given_["unk_token"]
    write_json(tmp_path / "tokenizer_config.json", given_)
    found = our_ids(tmp_path, turns([" hi  "]))
    assert len(found) == 4
    assert found == their_ids(tmp_path, turns([" hi  "]))


def test_roles_of_extra_special_tokens(tmp_path: Path) -> None:
    write_bytes(tmp_path, [flagged("<s>"), flagged("</s>"), flagged("<img>")])
    source = "{{ image_token + messages[0]['content'] }}"
    extra = {"image_token": "<img>"}
    given_ = settings(source, "PreTrainedTokenizerFast", extra_special_tokens=extra)
    del given_["unk_token"]
    write_json(tmp_path / "tokenizer_config.json", given_)
    found = our_ids(tmp_path, turns(["hi"]))
    assert found[0] == 2
    assert found == their_ids(tmp_path, turns(["hi"]))


def test_a_template_that_uses_a_token_of_nobody_is_refused(tmp_path: Path) -> None:
    write_bytes(tmp_path, [flagged("<s>"), flagged("</s>")])
    for source in ("{{ messages[0]['content'] }}{{ pad_token }}", "{{ messages[0]['content'] }}"):
        given_ = settings(source, "PreTrainedTokenizerFast", pad_token="<pad>")
        write_json(tmp_path / "tokenizer_config.json", given_)
        tokenizer = load_tokenizer(tmp_path, VOCAB)
        if "pad" in source:
            with pytest.raises(InputError, match="uses pad_token, which is '<pad>'"):
                load_chat_template(tmp_path, tokenizer)
        else:
            assert len(load_chat_template(tmp_path, tokenizer).encode(turns(["hi"]))) == 2


def test_special_tokens_are_not_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note.cache_clear()
    write_bytes(tmp_path, [flagged("<s>"), flagged("</s>")])
    given_ = settings("{{ bos_token }}", "PreTrainedTokenizerFast", split_special_tokens=True)
    write_json(tmp_path / "tokenizer_config.json", given_)
    assert our_ids(tmp_path, turns(["hi"])) == [0]
    assert our_ids(tmp_path, turns(["hi"])) == [0]
    assert capsys.readouterr().err.count("whatever split_special_tokens says") == 1


def test_a_text_does_not_spell_pieces_that_begin_with_a_space(tmp_path: Path) -> None:
    proto = pieces_model(("▁<PRE>", "▁<MID>"), ())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    write_json(tmp_path / "tokenizer_config.json", settings("{{ messages[0]['content'] }}▁<PRE>"))
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    named = {pieces.piece_to_id("▁<PRE>"), pieces.piece_to_id("▁<MID>")}
    text = "<PRE> x <MID> ▁<PRE>▁<MID>"
    assert named & set(pieces.encode(text))
    assert not named & set(tokenizer.encode(text))
    ids = load_chat_template(tmp_path, tokenizer).encode(turns([text]))
    assert ids[-1] == pieces.piece_to_id("▁<PRE>")
    assert not named & set(ids[:-1])
