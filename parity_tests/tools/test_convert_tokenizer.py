"""convert.py: Llama 3's tokenizer.model becomes a tokenizer.json that encodes as tiktoken does."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import TextModel, load
from llama_torch.common.errors import InputError
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Tokenizer
from tools import convert

from ..support.llama3_ranks import (
    N_RANKS,
    a_llama3,
    encoding,
    gpt2_ranks,
    lines,
    token_ids,
    with_tokens,
)
from .commands import run_convert

SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|reserved_special_token_7|>"]
# Characters that Python's table of Unicode has: those of newer versions the libraries may not know.
known = st.characters(exclude_categories=["Cs", "Cn"])
pieces = st.one_of(
    st.text(known, max_size=8),
    st.text(st.sampled_from(" \n\r\t\u00a0\u3000\u2028'\u017fstdK17²½٣aé漢"), max_size=8),
    st.sampled_from(["the ", "1234567", "don't", "WE'LL", "🙂\u200d🙂", "  x\r\n\r\n", *SPECIAL]),
)
texts = st.lists(pieces, max_size=6).map("".join)


class Converted(NamedTuple):
    """A checkpoint before and after, and tiktoken's encoding of its ranks."""

    source: Path
    folder: Path
    tiktoken: tiktoken.Encoding
    model: TextModel


@pytest.fixture(scope="module", params=[False, True], ids=["3", "3.1"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Converted:
    folder = tmp_path_factory.mktemp("llama3")
    a_llama3(folder / "a", gpt2_ranks(), request.param)
    run_convert(folder / "a", folder / "b")
    return Converted(folder / "a", folder / "b", encoding(gpt2_ranks()), load(folder / "b"))


@pytest.fixture(scope="module")
def theirs(converted: Converted) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(converted.folder)


@given(text=texts)
def test_ids_are_tiktokens_and_text_spells_no_special_token(
    converted: Converted, text: str
) -> None:
    expected = converted.tiktoken.encode_ordinary(text)
    assert converted.model.encode(text) == [N_RANKS, *expected]
    assert converted.model.tokenizer.decode(expected) == text


@given(text=texts)
def test_transformers_has_the_same_ids(converted: Converted, theirs: Any, text: str) -> None:
    expected = [N_RANKS, *converted.tiktoken.encode_ordinary(text)]
    assert theirs(text, split_special_tokens=True).input_ids == expected


def tokenizer_of(folder: Path, ranks: dict[bytes, int]) -> Tokenizer:
    a_llama3(folder / "a", ranks)
    run_convert(folder / "a", folder / "b")
    return load_tokenizer(folder / "b", len(ranks) + 256)


@given(
    tokens=st.lists(
        st.text("abé ", min_size=2, max_size=6).map(str.encode), max_size=30, unique=True
    ),
    texts=st.lists(st.text("abé ", max_size=20), min_size=5, max_size=5),
)
def test_any_list_of_tokens_merges_as_tiktoken_merges_it(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes], texts: list[str]
) -> None:
    """Tokens too that no merge makes, and those that merges of a higher rank make."""
    ranks = with_tokens(tokens)
    tokenizer = tokenizer_of(tmp_path_factory.mktemp("ranks"), ranks)
    for text in texts:
        assert tokenizer.encode(text) == encoding(ranks).encode_ordinary(text)


def test_the_order_of_the_lines_says_nothing(tmp_path: Path) -> None:
    ranks = gpt2_ranks(400)
    tokenizer = tokenizer_of(tmp_path, dict(reversed(ranks.items())))
    assert tokenizer.encode("the others") == encoding(ranks).encode_ordinary("the others")


def test_special_tokens_as_meta_names_them(converted: Converted) -> None:
    special = converted.model.tokenizer.special
    names = {id_ - N_RANKS: name for name, id_ in special.items()}
    assert sorted(names) == list(range(256))
    is_31 = converted.model.model.config.rope_type == "llama3"
    assert names[0] == "<|begin_of_text|>"
    assert names[1] == "<|end_of_text|>"
    assert names[6] == "<|start_header_id|>"
    assert names[7] == "<|end_header_id|>"
    assert names[9] == "<|eot_id|>"
    later = {2: 0, 3: 1, 4: 2, 5: 3, 8: 4, 10: 5, 255: 250}
    if is_31:
        named = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
        assert {place: names[place] for place in named} == named
        later = {2: 0, 3: 1, 5: 2, 11: 3, 255: 247}
    for place, number in later.items():
        assert names[place] == f"<|reserved_special_token_{number}|>"
    assert converted.model.end_ids == {N_RANKS + i for i in ((1, 8, 9) if is_31 else (1, 9))}
    ids = {"bos_token_id": N_RANKS, "eos_token_id": sorted(converted.model.end_ids)}
    ids |= {"pad_token_id": N_RANKS + 4} if is_31 else {}
    assert token_ids(converted.folder) == [ids, ids]


def test_metas_own_file_comes_back(converted: Converted, tmp_path: Path) -> None:
    """Beside Hugging Face's form it is where released checkpoints have it."""
    assert not (converted.folder / "tokenizer.model").exists()
    run_convert(converted.folder, tmp_path / "c")
    run_convert(tmp_path / "c", tmp_path / "d")
    for name in ("c/tokenizer.model", "d/original/tokenizer.model"):
        assert (tmp_path / name).read_bytes() == lines(gpt2_ranks())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "d" / name).read_bytes() == (converted.folder / name).read_bytes()


def test_beside_hugging_faces_form_it_is_refused_with_the_remedy(
    converted: Converted, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted.folder, tmp_path / "a")
    (folder / "original" / "tokenizer.model").rename(folder / "tokenizer.model")
    assert load(folder).encode("Hi") == converted.model.encode("Hi")  # by its tokenizer.json
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    remedy = r"a/tokenizer\.model: not a SentencePiece .* tools/convert\.py .*/a NEW_DIR --to hf"
    with pytest.raises(InputError, match=remedy):
        load(folder)
    run_convert(folder, tmp_path / "b", "--to", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (converted.folder / name).read_bytes()


def line_of(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


def changed(number: int, text: bytes) -> Callable[[bytes], bytes]:
    """Replace one line, counted from 1."""

    def edit(raw: bytes) -> bytes:
        rows = raw.splitlines(keepends=True)
        rows[number - 1] = text
        return b"".join(rows)

    return edit


DAMAGED: list[tuple[Callable[[bytes], bytes], str]] = [
    (changed(7, b"J!== 6\n"), "line 7: 'J!==' is not a token in base64"),
    (changed(1, b"IR== 0\n"), "line 1: 'IR==' is not a token in base64"),  # a bit beyond the byte
    (changed(7, b"Jw 6\n"), "line 7: 'Jw' is not a token in base64"),
    (changed(7, b" 6\n"), "line 7: '' is not a token in base64"),
    (changed(7, b"\n"), "line 7: '' is not a token in base64"),
    (changed(7, b"Jw==\n"), "line 7: '' is not a rank"),
    (changed(7, b"Jw== -6\n"), "line 7: '-6' is not a rank"),
    (changed(7, b"Jw== 06\n"), "line 7: '06' is not a rank"),
    (changed(7, b"Jw== \xc2\xb2\n"), "line 7: '\\xc2\\xb2' is not a rank"),
    (changed(7, b"Jw== " + b"9" * 5000 + b"\n"), "is not a rank"),
    (changed(301, line_of(b"never", 7)), "line 301: the rank 7 is that of line 8, too"),
    (changed(301, line_of(b"!", 300)), "line 301: the token b'!' is that of line 1, too"),
    (changed(301, line_of(b"never", 999)), "rank 300 is missing"),
    (changed(301, b""), "rank 300 is missing"),
    (changed(34, line_of(b"never", 33)), "1 single bytes have no rank (0x42 is the first)"),
    (changed(301, line_of(b"<|eot_id|>", 300)), "<|eot_id|> is a token of text there"),
    (lambda raw: raw[: raw.rindex(b"\n", 0, -1) + 1], "has 399 ranks, to which 256 special"),
    (lambda raw: raw[:-2], "line 400: the rank 39 is that of line 40, too"),
    (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    (lambda raw: b"\n" + raw, "not a SentencePiece model"),
    (lambda raw: b"", "not a SentencePiece model"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[text for _, text in DAMAGED])
def test_a_damaged_file_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    source = a_llama3(tmp_path / "a", gpt2_ranks(400))
    raw = (source / "tokenizer.model").read_bytes()
    (source / "tokenizer.model").write_bytes(damage(raw))
    assert convert.main([str(source), str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {source / 'tokenizer.model'}: ")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_template_places_special_tokens(converted: Converted, tmp_path: Path) -> None:
    """The names that stand in text are text; those that a template writes are tokens."""
    template = tmp_path / "template.jinja"
    template.write_text("<|start_header_id|>{{ messages[0]['content'] }}<|eot_id|>")
    model = load(converted.folder, template=str(template))
    found = model.chat_template.encode([{"role": "user", "content": "a<|eot_id|>"}])
    text = converted.tiktoken.encode_ordinary("a<|eot_id|>")
    assert found == [N_RANKS + 6, *text, N_RANKS + 9]


def test_merges_are_as_few_as_tokens(converted: Converted) -> None:
    model = json.loads((converted.folder / "tokenizer.json").read_text())["model"]
    assert model["ignore_merges"] is True
    assert len(model["merges"]) == N_RANKS - 256
