"""Text encoded by any checkpoint's tokenizer: its ids, and whose shards may be used."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_torch import prepare as prepare_command
from llama_torch.config import DataConfig
from llama_torch.data import documents
from llama_torch.data.corpus import load_corpus
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import find_files, identify
from llama_torch.tokenizer.encoding import GPT2, TextEncoding, load_encoding
from llama_torch.tokenizer.loading import load_tokenizer

from ..support import tokenizers
from ..support.token_shards import content_of, refused

VOCAB = 50257
SPELLED = "They spell </s>, <s>, <|begin|>, <|end|> and <|endoftext|> here."
DOCUMENTS = ["A llama walks.", "  Two\n\nllamas 1234 漢字 🙂.  ", "", SPELLED]
# BOS before and EOS after each document, as the checkpoints that they resemble were trained.
AROUND = {"gpt2": ([], [50256]), "bytes": ([0], [1]), "spaced": ([1], [2]), "pieces": ([1], [2])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each kind of tokenizer."""
    found = {}
    for kind, write in tokenizers.KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        write(found[kind])
    return found


@pytest.fixture(params=AROUND)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def encoding(kind: str, folders: dict[str, Path]) -> TextEncoding:
    return load_encoding(folders[kind], VOCAB)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_document_has_its_own_ids_between_bos_and_eos(
    kind: str, folders: dict[str, Path], encoding: TextEncoding, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENTS[1])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    text = identify([tmp_path / "a.txt", tmp_path / "b.jsonl"], "text", encoding)
    tokens = prepare(text, tmp_path / "out", workers, 17)
    tokenizer, (before, after) = load_tokenizer(folders[kind], VOCAB), AROUND[kind]
    expected: list[int] = []
    for document in [DOCUMENTS[1], *filter(None, DOCUMENTS)]:
        expected += [*before, *tokenizer.encode(document), *after]
    assert tokens[:].tolist() == expected
    assert expected.count(after[0]) == 4  # no text spells the end of a document
    if kind == "pieces":
        return  # transformers reads no tokenizer.model of this class
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    first = theirs(DOCUMENTS[0])["input_ids"]
    start = len([*before, *tokenizer.encode(DOCUMENTS[1]), *after])
    assert expected[start : start + len(first)] == first


@settings(max_examples=50)
@given(
    kind=st.sampled_from(sorted(AROUND)),
    text=st.lists(tokenizers.pieces, min_size=1, max_size=20).map("".join).filter(str.strip),
    size=st.integers(4, 60),
)
def test_a_document_cut_into_pieces_is_one_document(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    text: str,
    size: int,
) -> None:
    """No space comes between pieces; BOS and EOS stand once."""
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(text.encode())
    encoding = load_encoding(folders[kind], VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(documents.pieces([path], "text"))
    found = [i for piece in pieces for i in documents.encode(piece, "text", encoding)[0].tolist()]
    before, after = AROUND[kind]
    assert found[: len(before)] == before
    assert found[-1:] == after
    inner = found[len(before) : -1]
    assert not {*before, *after} & {*inner}
    whole = encoding.tokenizer.encode(documents_text(path))
    assert encoding.tokenizer.decode(inner) == encoding.tokenizer.decode(whole)


def documents_text(path: Path) -> str:
    return "".join(documents.documents([path], "text"))


def test_a_resumed_document_begins_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """From whichever piece it goes on, with a byte-order mark and without."""
    for bom in (b"", documents.BOM):
        path = tmp_path / "a.txt"
        path.write_bytes(bom + b"one two three four five six seven eight nine ten")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "PIECE", 9)
            pieces = list(documents.pieces([path], "text"))
            assert [piece.is_first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
            assert len(pieces) > 3
            for i, piece in enumerate(pieces):
                assert list(documents.pieces([path], "text", 0, piece.start)) == pieces[i:]


def test_shards_of_another_tokenizer_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A llama walks over the hill. " * 40)
    encodings = {kind: load_encoding(folder, VOCAB) for kind, folder in folders.items()}
    for kind, encoding in encodings.items():
        text = identify(find_files([str(tmp_path / "a.txt")]), "text", encoding)
        prepare(text, tmp_path / kind, 1)
        config = DataConfig(data=(str(tmp_path / kind),))
        for other, asked in encodings.items():
            if other == kind:
                load_corpus(config, VOCAB, 8, asked)
                continue
            said = refused(lambda: load_corpus(config, VOCAB, 8, asked))  # noqa: B023
            assert said.startswith(f"{tmp_path / kind}/index.json: holds ids of another tokenizer")
            assert f"python -m llama_torch.prepare{asked.flag}" in said
            assert ("--init-from" in said) == (other == "gpt2")
        other_text = text._replace(encoding=encodings["gpt2" if kind != "gpt2" else "bytes"])
        assert "tokens of another text" in refused(
            lambda: prepare(other_text, tmp_path / kind, 1)  # noqa: B023
        )


def test_a_tokenizer_is_known_by_what_determines_ids(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A copy is the same one, whatever its chat template; another token makes another one."""
    (tmp_path / "a.txt").write_text("A llama walks over the hill.")
    keys = {}
    for kind, folder in folders.items():
        copied = tmp_path / kind
        shutil.copytree(folder, copied)
        side = copied / "tokenizer_config.json"
        content = json.loads(side.read_text())
        side.write_text(json.dumps({**content, "chat_template": "{{ messages }}"}, indent=1))
        keys[kind] = identify([tmp_path / "a.txt"], "text", load_encoding(folder, VOCAB)).key
        assert (
            identify([tmp_path / "a.txt"], "text", load_encoding(copied, VOCAB)).key == keys[kind]
        )
        if kind == "gpt2":
            assert load_encoding(copied, VOCAB) == GPT2
            continue
        again = tmp_path / f"{kind} again"
        shutil.copytree(copied, again)
        (again / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|z|>"]}')
        key = identify([tmp_path / "a.txt"], "text", load_encoding(again, VOCAB)).key
        assert key != keys[kind]
    assert len({*keys.values()}) == len(keys)


def test_a_tokenizer_without_an_end_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["bytes"] / "tokenizer.json", tmp_path)
    said = refused(lambda: load_encoding(tmp_path, VOCAB))
    assert said.startswith(f"{tmp_path}: its tokenizer names no eos_token")


def test_the_command_prepares_with_a_tokenizer(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("A llama walks over the hill. " * 40)
    common = ["--data", str(tmp_path / "a.txt"), "--workers", "1", "--tokenizer"]
    pieces = str(folders["pieces"])
    assert prepare_command.main([*common, pieces, "--out", str(tmp_path / "one")]) == 0
    assert f"train --init-from {pieces} --data {tmp_path}/one" in capsys.readouterr().out
    text = identify([tmp_path / "a.txt"], "text", load_encoding(folders["pieces"], VOCAB))
    prepare(text, tmp_path / "other", 1)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "other")
    assert prepare_command.main(["--verify", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    for wrong, said in ((tmp_path, "holds no tokenizer.json"), (tmp_path / "no", "no such dir")):
        assert prepare_command.main([*common, str(wrong), "--out", str(tmp_path / "three")]) == 2
        assert said in capsys.readouterr().err
