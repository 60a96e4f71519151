"""Text that is shown token by token: whole characters, and nothing of a stop text."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_torch.tokenizer.detokenizer import Detokenizer
from llama_torch.tokenizer.gpt2 import gpt2
from llama_torch.tokenizer.tokenizer import Gpt2, Tokenizer

from ..support.tokenizers import KINDS, texts


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
