"""The files beside a tokenizer: what they add and rename, as transformers reads them."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from llama_common.errors import InputError
from llama_common.files import write_json
from llama_torch.tokenizer.chat_template import load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.pieces import CONTROL, piece_spans, read_piece, with_kinds

from ..support.tokenizer_folders import IS_V4, VOCAB, our_ids, their_ids, transformers
from ..support.tokenizers import LETTERS, pieces_model, turns, write_json_tokenizer

# Two that overlap, two that are like words, and one of no letters.
NAMES = ("<|a|>", "<|b|>", "<|a|><|b|>", "[X]", "<t>", "end", "ab", "☃")
SAID = ("hi", "  hi  there ", "", "x y ", "a_b", " ", "\nthe")
# Version 4 reads extra_special_tokens as a dict alone, and 5 reads and writes it as a list.
LIST = "additional_special_tokens" if IS_V4 else "extra_special_tokens"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@st.composite
def beside_json(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Draw the files beside a tokenizer.json, by name, and words that its vocabulary has."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=3, max_size=3, unique=True))
    inside = [name for name in names if draw(st.booleans())]
    taken = 2 + len(LETTERS) + len(inside)
    ids = {name: 2 + len(LETTERS) + i for i, name in enumerate(inside)}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    form = draw(st.sampled_from(["added_tokens_decoder", "added_tokens.json"]))
    listed: dict[str, Any] = {}
    for name in names:
        if draw(st.booleans()):
            settings.setdefault(LIST, []).append(name)
            continue
        if name not in ids:
            ids[name], taken = taken, taken + 1
        flags = {flag: draw(st.booleans()) for flag in FLAGS}
        token = {"content": name, "special": True, **flags}
        listed |= {str(ids[name]): token} if form.endswith("decoder") else {name: ids[name]}
    order = draw(st.permutations(names))
    settings["chat_template"] = (
        "{{ bos_token }}"
        + "".join(f"{{{{ {name!r} + messages[0]['content'] }}}}" for name in order)
        + "".join(draw(st.permutations(names))[:2])
    )
    files: dict[str, Any] = {"tokenizer_config.json": settings}
    if listed and form.endswith("decoder"):
        settings[form] = listed
    elif listed:
        files[form] = listed
    return files, inside


@given(beside=beside_json(), said=st.sampled_from(SAID))
def test_tokens_beside_a_tokenizer_json(
    beside: tuple[dict[str, Any], list[str]], said: str
) -> None:
    files, inside = beside
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json_tokenizer(folder, inside)
        for file, content in files.items():
            write_json(folder / file, content)
        messages = turns([said])
        assert our_ids(folder, messages) == their_ids(folder, messages)


model_file = cache(pieces_model)


@st.composite
def beside_pieces(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """Draw a tokenizer.model and the settings beside it."""
    user, control = draw(
        st.sampled_from([((), ()), (("<|u|>",), ("<|c|>",)), ((), ("<|c|>", "<|d|>"))])
    )
    proto = model_file(user, control)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    flags = dict.fromkeys(FLAGS, False) | {"special": True}
    names = ["<s>", "</s>", *user, *control]
    known = {str(pieces.piece_to_id(n)): {"content": n, **flags} for n in ["<unk>", *names]}
    if draw(st.booleans()):
        known["400"] = {"content": "<|new|>", **flags}
        names.append("<|new|>")
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": known}
    settings["legacy"] = draw(st.booleans())
    settings["add_prefix_space"] = draw(st.sampled_from([True, False, None]))
    order = draw(st.lists(st.sampled_from(names), min_size=4, max_size=4))
    said = "{{ messages[0]['content'] }}"
    source = said.join(order) if draw(st.booleans()) else said + said.join(order)
    return proto, {k: v for k, v in settings.items() if v is not None} | {"chat_template": source}


# Before text that begins with a space sentencepiece, and so we, put another; transformers 5 none.
@given(beside=beside_pieces(), said=st.sampled_from([text for text in SAID if text[:1] != " "]))
def test_settings_beside_a_tokenizer_model(beside: tuple[bytes, dict[str, Any]], said: str) -> None:
    proto, settings = beside
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(proto)
        write_json(folder / "tokenizer_config.json", settings)
        messages = turns([said])
        assert our_ids(folder, messages) == their_ids(folder, messages)


def test_a_piece_that_is_renamed_keeps_its_id(tmp_path: Path) -> None:
    """As InternLM2's do; its old name, and any special piece, is found in no text."""
    proto = model_file(("[UNUSED_1]", "<|u|>"), ())
    (tmp_path / "tokenizer.model").write_bytes(proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    unused, marked = (pieces.piece_to_id(name) for name in ("[UNUSED_1]", "<|u|>"))
    settings = {"added_tokens_decoder": {str(unused): {"content": "<|im|>", "special": True}}}
    settings |= {"eos_token": "<|u|>", "chat_template": "<|im|>{{ messages[0]['content'] }}<|u|>"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    assert tokenizer.special["<|im|>"] == unused
    assert tokenizer.special[tokenizer.eos or ""] == marked
    said = "a <|u|> [UNUSED_1] <|im|> b"
    ids = load_chat_template(tmp_path, tokenizer).encode(turns([said]))
    assert (ids[0], ids[-1]) == (unused, marked)
    assert not {unused, marked} & {*ids[1:-1], *tokenizer.encode(said)}
    assert tokenizer.decode(ids) == said


@given(kinds=st.dictionaries(st.integers(259, 399), st.just(CONTROL), max_size=5))
def test_a_models_pieces_are_changed_and_nothing_else(kinds: dict[int, int]) -> None:
    proto = model_file((), ())
    changed = with_kinds(proto, kinds)
    before, after = (
        [read_piece(model[start:end]) for start, end in piece_spans(model)]
        for model in (proto, changed)
    )
    assert [piece.text for piece in after] == [piece.text for piece in before]
    assert [p.kind for p in after] == [kinds.get(i, p.kind) for i, p in enumerate(before)]
    library = sentencepiece.SentencePieceProcessor(model_proto=changed)
    assert [library.id_to_piece(i) for i in range(400)] == [piece.text for piece in before]
    assert {i for i in range(400) if library.is_control(i)} == {1, 2, *kinds}


def test_an_ordinary_token_added_to_a_tokenizer_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file((), ()))
    write_json(tmp_path / "added_tokens.json", {"word": 400})
    with pytest.raises(InputError, match="adds 'word', an ordinary token, to tokenizer.model"):
        load_tokenizer(tmp_path, VOCAB)


def test_other_roles_are_a_templates_variables(tmp_path: Path) -> None:
    write_json_tokenizer(tmp_path, ["<pad>", "<unk>"])
    source = "{{ pad_token }}{{ messages[0]['content'] }}{{ unk_token }}{{ mask_token }}"
    settings = {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}, "chat_template": source}
    write_json(tmp_path / "tokenizer_config.json", settings)
    first = 2 + len(LETTERS)
    h = 2 + LETTERS.index("h")
    assert our_ids(tmp_path, turns(["h"])) == [first, h, first + 1]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("template", ["<s> $A", "<s> </s> $A </s>", "$A", "$A </s>"])
def test_a_prefix_is_read_from_the_post_processor(
    tmp_path: Path, template: str, wrapped: bool
) -> None:
    """For a tokenizer without letters too: no probe text is encoded."""
    single: Any = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    if wrapped:
        single = processors.Sequence([processors.ByteLevel(trim_offsets=False), single])
    made = tokenizers.Tokenizer(models.BPE({"A": 0, "C": 1, "G": 2, "AC": 3}, [("A", "C")]))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = single
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    before = template.partition("$A")[0].split()
    assert tokenizer.prefix == tuple({"<s>": 4, "</s>": 5}[name] for name in before)
    whole = [*tokenizer.prefix, *tokenizer.encode("ACG")]
    assert whole == made.encode("ACG").ids[: len(whole)]


def test_merges_that_spell_a_special_token_make_none_of_a_message(tmp_path: Path) -> None:
    """The vocabulary's merges spell EOS, which only tokenizer_config.json names."""
    vocab = {name: i for i, name in enumerate([*LETTERS, "<e", "<e>"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("<", "e"), ("<e", ">")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    source = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<e>", "chat_template": source})
    end, part = vocab["<e>"], vocab["<e"]
    assert our_ids(tmp_path, turns(["<e>"])) == [part, vocab[">"], end]


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_bos_that_versions_of_transformers_differ_about_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, add: bool | None, template: str
) -> None:
    """Without a note every version puts the same tokens first; version 5 does in any case."""
    write_json_tokenizer(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(
        tmp_path / "tokenizer_config.json",
        settings | {"add_bos_token": add} if add is not None else settings,
    )
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    said = capsys.readouterr().err
    assert (said.count("\n"), "BOS" in said) in [(0, False), (1, True)]
    if not said or not IS_V4:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids
        assert [*tokenizer.prefix, *tokenizer.encode("hi")] == theirs
    if said:
        assert (add is None and kind != "PreTrainedTokenizerFast") or add == (template == "$A")


@pytest.mark.parametrize("said", [True, False])
def test_clean_up_of_spaces_is_noted_and_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: bool
) -> None:
    write_json_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"clean_up_tokenization_spaces": said})
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    assert ("clean_up_tokenization_spaces is not done" in capsys.readouterr().err) == said
    assert tokenizer.decode(tokenizer.encode("hello , world .")) == "hello , world ."
