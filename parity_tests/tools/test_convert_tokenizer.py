"""convert.py: Llama 3's tokenizer.model becomes a tokenizer.json that encodes as tiktoken does."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import load
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Tokenizer

from ..support.llama3_ranks import (
    N_RANKS,
    a_llama3,
    encoding,
    gpt2_ranks,
    token_ids,
    with_tokens,
)
from .commands import Converted, run_convert

SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|reserved_special_token_7|>"]
# Characters that Python's table of Unicode has: those of newer versions the libraries may not know.
known = st.characters(exclude_categories=["Cs", "Cn"])
pieces = st.one_of(
    st.text(known, max_size=8),
    st.text(st.sampled_from(" \n\r\t\u00a0\u3000\u2028'\u017fstdK17²½٣aé漢"), max_size=8),
    st.sampled_from(["the ", "1234567", "don't", "WE'LL", "🙂\u200d🙂", "  x\r\n\r\n", *SPECIAL]),
)
texts = st.lists(pieces, max_size=6).map("".join)


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


def strings(characters: str, *lengths: int) -> list[str]:
    products = (itertools.product(characters, repeat=n) for n in lengths)
    return ["".join(string) for product in products for string in product]


def test_a_text_is_cut_as_tiktoken_cuts_it(tmp_path: Path) -> None:
    """All tokens of two and three characters are there, so that ids tell where a text is cut."""
    characters = "aS1 \n\r'."
    endings = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'Re", "'LL", "'\u017f", "'x"]
    endings = [f"{ending}a" for ending in endings]
    tokens = [*strings(characters, 2, 3), *endings, *(ending[1:] for ending in endings)]
    ranks = with_tokens(map(str.encode, [*tokens, "1111", "    "]))
    ours, theirs = tokenizer_of(tmp_path, ranks), encoding(ranks)
    for text in [*strings(characters, 1, 2, 3, 4), *(f"a{ending}" for ending in endings)]:
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text)


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
