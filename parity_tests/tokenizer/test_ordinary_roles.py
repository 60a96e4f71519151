"""Special tokens that are ordinary pieces as well: text keeps its ids and comes back whole."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from llama_common import notes
from llama_common.errors import InputError
from llama_torch.tokenizer.chat_template import ChatTemplate
from llama_torch.tokenizer.detokenizer import Detokenizer
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import MARKED

from ..support.tokenizers import KINDS, texts, turns

VOCAB = 50257
PLACED = "{{ pad_token }}{{ pad_token }}{{ messages[0]['content'] }}"
# Each kind's spelling of a space, a full stop and a newline, and a word.
ORDINARY = {
    "gpt2": ("Ġ", ".", "Ċ", "Ġthe", "end"),
    "bytes": ("Ġ", ".", "Ċ", "Ġthe", "Ģ"),
    "spaced": ("\u2581", ".", "<0x0A>", "\u2581the"),
    "pieces": ("\u2581", ".", "<0x0A>", "\u2581the"),
}
FORMS = ("role", "listed beside", "listed inside")


@cache
def made(kind: str) -> Path:
    return KINDS[kind](Path(tempfile.mkdtemp()))


@cache
def vocabulary(kind: str) -> dict[str, int]:
    """Return the ids of a kind's pieces, those that are special in any case left out."""
    if kind == "pieces":
        library = sentencepiece.SentencePieceProcessor(str(made(kind) / "tokenizer.model"))
        ids = {library.id_to_piece(i): i for i in range(3, library.get_piece_size())}
    else:
        content = json.loads((made(kind) / "tokenizer.json").read_text())
        ids = content["model"]["vocab"]
    return {n: i for n, i in ids.items() if not MARKED.fullmatch(n) or n.startswith("<0x")}


def with_role(kind: str, role: str, name: str, form: str, folder: Path) -> Path:
    """Copy a kind's files with one role, in one of the forms that files have for it."""
    shutil.copytree(made(kind), folder)
    path, id_ = folder / "tokenizer_config.json", vocabulary(kind)[name]
    settings = json.loads(path.read_text()) | {role: name}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"content": name, **flags, "special": True}
    if form == "listed beside":
        settings["added_tokens_decoder"] = {str(id_): token}
    if form == "listed inside" and kind != "pieces":
        inside = json.loads((folder / "tokenizer.json").read_text())
        inside["added_tokens"].append({"id": id_, **token})
        (folder / "tokenizer.json").write_text(json.dumps(inside))
    path.write_text(json.dumps(settings))
    return folder


@cache
def plain(kind: str) -> Any:
    """Return the library's own encoding of text in which no special token is looked for."""
    if kind == "pieces":
        return sentencepiece.SentencePieceProcessor(str(made(kind) / "tokenizer.model")).encode
    library = tokenizers.Tokenizer.from_file(str(made(kind) / "tokenizer.json"))
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


@st.composite
def roles(draw: st.DrawFn, kind: str) -> tuple[str, str, str]:
    role = draw(st.sampled_from(["pad_token", "unk_token", "sep_token", "image_token"]))
    name = st.sampled_from(ORDINARY[kind]) | st.sampled_from(sorted(vocabulary(kind)))
    return role, draw(name), draw(st.sampled_from(FORMS))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_text_comes_back_by_the_librarys_own_ids(kind: str, data: st.DataObject) -> None:
    role, name, form = data.draw(roles(kind))
    pieces = [name, name.replace("Ġ", " ").replace("\u2581", " ").replace("Ċ", "\n"), "\n", "."]
    text = data.draw(st.lists(st.sampled_from(pieces) | texts, max_size=5).map("".join))
    with tempfile.TemporaryDirectory() as parent:
        tokenizer = load_tokenizer(with_role(kind, role, name, form, Path(parent) / "x"), VOCAB)
    ids = tokenizer.encode(text)
    assert ids == plain(kind)(text)
    stream = Detokenizer(tokenizer, [])
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    if kind in ("gpt2", "bytes") or "\u2581" not in text:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in ORDINARY.items() for n in names])
@pytest.mark.parametrize("form", FORMS)
def test_a_template_places_it_and_a_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, form: str
) -> None:
    notes.note.cache_clear()
    tokenizer = load_tokenizer(with_role(kind, "pad_token", name, form, tmp_path / "x"), VOCAB)
    id_ = vocabulary(kind)[name]
    ids = ChatTemplate(PLACED, "here", tokenizer).encode(turns(["a b"]))
    assert ids[:2] == [id_, id_]
    assert tokenizer.decode(ids[2:]).strip() == "a b"
    [line] = capsys.readouterr().err.splitlines()
    assert f"{name!r} is named as a special token and is an ordinary piece" in line


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in ORDINARY.items() for n in names])
@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_no_text_may_contain_bos_or_eos(tmp_path: Path, kind: str, name: str, role: str) -> None:
    for form in FORMS:
        folder = with_role(kind, role, name, form, tmp_path / form)
        with pytest.raises(InputError, match=f"{role} is .* an ordinary piece of the tokenizer"):
            load_tokenizer(folder, VOCAB)


@pytest.mark.parametrize("name", ["word", "<0x0B>", "[pad]"])
def test_a_piece_that_no_text_spells_is_hidden_as_before(tmp_path: Path, name: str) -> None:
    """No merge makes it: EOS may have the name."""
    content = json.loads((made("bytes") / "tokenizer.json").read_text())
    content["model"]["vocab"][name] = id_ = 500
    shutil.copytree(made("bytes"), tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").write_text(json.dumps(content))
    settings = tmp_path / "x" / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": name}))
    tokenizer = load_tokenizer(tmp_path / "x", VOCAB)
    assert (tokenizer.special[name], tokenizer.ordinary) == (id_, set())
    assert id_ not in tokenizer.encode(name)
    assert tokenizer.decode([*tokenizer.encode(name), id_]) == name


def model_json(folder: Path, model: Any, pad: str, **settings: Any) -> Path:
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, **settings}))
    return folder


@pytest.mark.parametrize("pad", ["a", "##b", "ab", "c</w>"])
def test_pieces_of_other_models_stay_pieces(tmp_path: Path, pad: str) -> None:
    names = ["<unk>", "a", "b", "##b", "##a", "ab", "c</w>", "##c</w>", "##b</w>"]
    vocab = {name: i for i, name in enumerate(names)}
    models = tokenizers.models
    for model in (
        models.BPE(
            vocab,
            [("a", "##b")],
            continuing_subword_prefix="##",
            end_of_word_suffix="</w>",
            unk_token="<unk>",
        ),
        models.BPE(vocab, [], ignore_merges=True, unk_token="<unk>"),
        models.WordPiece(vocab, unk_token="<unk>"),
        models.WordLevel(vocab, unk_token="<unk>"),
        models.Unigram([(name, -1.0) for name in names], 0, False),
    ):
        expected = tokenizers.Tokenizer(model)
        found = load_tokenizer(model_json(tmp_path, model, pad), VOCAB)
        assert found.special[pad] == vocab[pad]
        for text in ("a", "ab", "abc", "ba", "c", "##b", pad):
            assert found.encode(text) == expected.encode(text).ids


def test_a_word_that_a_file_lists_as_special_is_no_word_of_a_model_without_merges(
    tmp_path: Path,
) -> None:
    """Whose trainers put special tokens among the pieces."""
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("PAD", 0.0), *((c, -1.0) for c in "PAD")])
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["PAD"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "PAD"}')
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    assert tokenizer.encode("PAD") == [2, 3, 4]


@pytest.mark.parametrize("kind", ["gpt2", "bytes"])
@pytest.mark.parametrize("form", FORMS[::2])
@given(text=texts)
@example(text="Is it? It is.\n the end.")
def test_transformers_encodes_the_same(kind: str, form: str, text: str) -> None:
    for name in (".", "Ġthe"):
        own, theirs = _both(kind, name, form)
        found = [*own.prefix, *own.encode(text)]
        assert found == theirs(text, split_special_tokens=True).input_ids


@cache
def _both(kind: str, name: str, form: str) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as parent:
        folder = with_role(kind, "pad_token", name, form, Path(parent) / "x")
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return load_tokenizer(folder, VOCAB), theirs


def test_a_message_with_the_piece_passes_a_template_that_hides_its_origin() -> None:
    """A piece of text may be spelled by anybody; a special token of unknown origin is refused."""
    own, _ = _both("bytes", ".", "role")
    template = ChatTemplate("{{ '%s!' | format(messages[0]['content']) }}", "here", own)
    assert template.encode(turns(["a. b."])) == own.encode("a. b.!")
    with pytest.raises(InputError, match="of pieces by an operation"):
        template.encode(turns(["<|end|>"]))
