"""Tokenizers: as their libraries have it, with special tokens that no text can spell."""

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_torch.common.errors import InputError
from llama_torch.tokenizer.detokenizer import Detokenizer
from llama_torch.tokenizer.gpt2 import gpt2
from llama_torch.tokenizer.loading import end_ids, load_tokenizer
from llama_torch.tokenizer.tokenizer import Gpt2, Json, SentencePiece, Tokenizer

from ..support.tokenizers import KINDS, SPECIALS

VOCAB = 50257
SPELLED = [*SPECIALS, "<s>", "</s>", "<unk>", "<|endoftext|>"]
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from([" ", "  ", "\n\n", "the ", "1234", "é漢字", "🙂\u200d🙂", "don't", *SPELLED]),
)
texts = st.lists(pieces, max_size=6).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder, VOCAB) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    load = transformers.PreTrainedTokenizerFast.from_pretrained
    return {kind: load(folders[kind]) for kind in ("gpt2", "bytes", "spaced")}


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


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, before=texts)
@example(text="🙂漢é", before="🙂")
@example(text="\n🙂", before="")
def test_streamed_pieces_are_whole_and_make_the_text(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, before: str
) -> None:
    """What continues a prompt is what the whole decodes to, less the prompt."""
    tokenizer = tokenizers[kind]
    start = [*tokenizer.prefix, *tokenizer.encode(before)]
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer, start)
    shown = [stream.push(id_) for id_ in ids]
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text
    whole = tokenizer.decode([*start, *ids])
    assert tokenizer.decode(start) + "".join(shown) + stream.finish() == whole


@given(text=st.text())
@example(text="🙂漢é")
def test_a_piece_comes_with_its_last_byte(text: str) -> None:
    encoding, ids = gpt2(), gpt2().encode_ordinary(text)
    stream, shown, raw = Detokenizer(Gpt2(), []), "", b""
    for id_ in ids:
        raw += encoding.decode_single_token_bytes(id_)
        shown += stream.push(id_)
        complete = raw.decode("utf-8", errors="ignore")  # leaves an unfinished end out
        assert shown == complete.rstrip("\ufffd") or "\ufffd" in text


@pytest.mark.parametrize("before", ["漢字", "漢字漢字漢字漢字", "字漢字漢字漢字"])
def test_a_character_after_characters_in_bytes(
    tokenizers: dict[str, Tokenizer], before: str
) -> None:
    """A decoder that sees half of one character in a run of bytes gives up the whole run.

    Also where the run is longer than what a stream looks back upon, which then begins inside one.
    """
    tokenizer = tokenizers["spaced"]
    start, ids = tokenizer.encode(before), tokenizer.encode(before + "🙂")
    assert ids[: len(start)] == start
    stream = Detokenizer(tokenizer, start)
    assert [stream.push(id_) for id_ in ids[len(start) :]] == ["", "", "", "🙂"]


def test_half_a_character_at_the_end_is_marked() -> None:
    ids = gpt2().encode_ordinary("🙂")
    stream = Detokenizer(Gpt2(), [])
    assert (stream.push(ids[0]), stream.finish()) == ("", "\ufffd")
    assert Detokenizer(Gpt2(), []).push(50300) == ""  # a padded vocabulary's id


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.text("abx ", min_size=1, max_size=30),
    stop=st.lists(st.text("abx ", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_text_is_shown(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, stop: list[str]
) -> None:
    tokenizer = tokenizers[kind]
    stream, shown = Detokenizer(tokenizer, tokenizer.encode("a"), stop), ""
    for id_ in tokenizer.encode("a" + text)[len(tokenizer.encode("a")) :]:
        shown += stream.push(id_)
        if stream.stopped:
            break
    else:
        shown += stream.finish()
    whole = tokenizer.decode(tokenizer.encode("a" + text))
    start = tokenizer.decode(tokenizer.encode("a" + text)[: len(tokenizer.encode("a"))])
    whole = whole[len(start) :]
    if start != "a":
        return  # "a" and the text share a token: nothing to compare
    ends = [n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stop))]
    if ends:  # the first to be complete; of two that end there, the longer
        whole = whole[: ends[0] - max(len(s) for s in stop if whole[: ends[0]].endswith(s))]
    assert shown == whole
    assert stream.stopped == bool(ends)


class Words(Tokenizer):
    """A tokenizer whose tokens are given texts."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__({}, len(words))
        self.words = words

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        return "".join(self.words[id_] for id_ in ids)


@st.composite
def nested_stops(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """A text in pieces that holds a stop text, and stop texts some of which lie in others."""
    outer = draw(st.text("abc", min_size=2, max_size=5))
    start = draw(st.integers(0, len(outer) - 1))
    stops = [outer, outer[start : draw(st.integers(start + 1, len(outer)))]]
    stops += draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=1))
    text = draw(st.text("abcx", max_size=4)) + outer + draw(st.text("abcx", max_size=4))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    return [part for part in parts if part], draw(st.permutations(stops))


@given(case=nested_stops())
@example((["xabc"], ["ab", "abc"]))
@example((["xabc"], ["abc", "b"]))
@example((["xa", "b", "c"], ["abc", "b"]))
@example((["xab", "c"], ["bc", "abc"]))
@example((["xab", "cx"], ["abc", "bc"]))
@example((["xabcx", "x"], ["c", "abc"]))
@example((["xa", "bd"], ["abc", "bd"]))
@example((["xa", "b"], ["abc"]))
@example((["ca", "bab", "c"], ["babc", "abc", "bb"]))
@example((["cac"], ["aca", "b"]))
def test_of_stop_texts_in_one_another_the_first_complete_one_ends_the_text(
    case: tuple[list[str], list[str]],
) -> None:
    """However tokens divide it: as if it came character by character, and no piece too late."""
    parts, stops = case
    text = "".join(parts)
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))]
    cut = len(text)
    if ends:
        cut = ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
    stream, shown, read = Detokenizer(Words(parts), [], stops), "", ""
    for id_, part in enumerate(parts):
        shown, read = shown + stream.push(id_), read + part
        assert stream.stopped == (bool(ends) and len(read) >= ends[0])
        if stream.stopped:
            break
        # Shown is all but what may yet become a stop text.
        held = max(n for n in range(len(read) + 1) if any_begins(stops, read[len(read) - n :]))
        assert shown == read[: len(read) - held]
    else:
        shown += stream.finish()
    assert shown == text[:cut]
    assert stream.stopped == bool(ends)


def any_begins(stops: Sequence[str], end: str) -> bool:
    return not end or any(stop.startswith(end) for stop in stops)


def test_a_stop_text_may_be_what_marks_half_a_character() -> None:
    stream = Detokenizer(Gpt2(), [], ["\ufffd"])
    assert (stream.push(gpt2().encode_ordinary("🙂")[0]), stream.stopped) == ("", False)
    assert (stream.finish(), stream.stopped) == ("", True)


def test_end_tokens_and_their_places(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bytes"], tmp_path / "copy")
    tokenizer = load_tokenizer(folder, VOCAB)
    assert end_ids(folder, tokenizer, VOCAB) == {tokenizer.special["<|end|>"]}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert end_ids(folder, tokenizer, VOCAB) == {7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_ids(folder, tokenizer, VOCAB) == {7, 9}
    for wrong in ("[7, 50257]", "-1", '"7"'):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
            end_ids(folder, tokenizer, VOCAB)


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


def test_what_stands_for_no_text_leaves_its_neighbours_alone(
    tokenizers: dict[str, Tokenizer],
) -> None:
    """A decoder drops the space of what it takes for the beginning."""
    tokenizer = tokenizers["spaced"]
    start = tokenizer.encode("one")
    stream = Detokenizer(tokenizer, start)
    ids = [2, *tokenizer.encode("two"), 49_999]
    pieces = "".join(stream.push(id_) for id_ in ids) + stream.finish()
    assert pieces == tokenizer.decode([*start, *ids])[len("one") :] == " two"


def test_bytes_that_are_no_character_come_out_in_time(tokenizers: dict[str, Tokenizer]) -> None:
    stream = Detokenizer(tokenizers["spaced"], [])
    byte = tokenizers["spaced"].encode("\ufffd")[-1]
    shown = [stream.push(byte) for _ in range(400)]
    assert len("".join(shown)) > 380
    assert len(stream.window) < 40


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
        ("pieces", "tokenizer.model", "IQ== 0\n", VOCAB, "not a SentencePiece model"),
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
            '{"added_tokens_decoder": {"400": {"content": "<new>"}}}',
            VOCAB,
            "adds <new> to tokenizer.model",
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
