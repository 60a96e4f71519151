"""convert.py: Llama 3's tokenizer.model, damaged or whole, where each form has it."""

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_parity import convert
from llama_torch import load

from ..support.llama3_ranks import N_RANKS, a_llama3, gpt2_ranks, lines
from .commands import Converted, run_convert


def test_metas_own_file_comes_back(converted: Converted, tmp_path: Path) -> None:
    """Beside Hugging Face's form it is where released checkpoints have it."""
    assert not (converted.folder / "tokenizer.model").exists()
    run_convert(converted.folder, tmp_path / "c")
    run_convert(tmp_path / "c", tmp_path / "d")
    run_convert(tmp_path / "d", tmp_path / "e", "--to", "hf")
    for name in ("c/tokenizer.model", "d/original/tokenizer.model", "e/original/tokenizer.model"):
        assert (tmp_path / name).read_bytes() == lines(gpt2_ranks())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "d" / name).read_bytes() == (converted.folder / name).read_bytes()


def test_a_list_of_ranks_beside_hugging_faces_form_takes_the_place_of_the_original(
    converted: Converted, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(converted.folder, folder)
    (folder / "original" / "tokenizer.model").rename(folder / "tokenizer.model")
    (folder / "original" / "tokenizer.model").write_bytes(b"another")
    run_convert(folder, tmp_path / "b", "--to", "hf")
    assert (tmp_path / "b" / "original" / "tokenizer.model").read_bytes() == lines(gpt2_ranks())
    assert not (tmp_path / "b" / "tokenizer.model").exists()


def test_a_tokenizer_json_that_was_cut_off_is_one_line(
    converted: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(converted.folder, folder)
    shutil.rmtree(folder / "original")
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    for _ in range(2):  # without the ids, the tokenizer is asked for them
        capsys.readouterr()
        assert convert.main([str(folder), str(tmp_path / "b")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: is not JSON (")
        assert error.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        (folder / "generation_config.json").unlink(missing_ok=True)


def changed_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_all_merges(content: dict[str, Any]) -> None:
    """List every pair of tokens that makes a token, as released files do, as pairs."""
    vocab = content["model"]["vocab"]
    content["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in sorted(vocab, key=vocab.__getitem__)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]


def test_without_metas_own_file_it_is_made_of_the_tokenizer_json(
    converted: Converted, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted.folder, tmp_path / "a")
    shutil.rmtree(folder / "original")
    run_convert(folder, tmp_path / "b")
    changed_json(folder, with_all_merges)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > N_RANKS
    run_convert(folder, tmp_path / "c")
    for name in "bc":
        assert (tmp_path / name / "tokenizer.model").read_bytes() == lines(gpt2_ranks())


def swapped(merges: list[str]) -> None:
    merges[3], merges[4] = merges[4], merges[3]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(ignore_merges=False),
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"]["merges"].pop(5),
        lambda c: swapped(c["model"]["merges"]),
        lambda c: c["model"].pop("vocab"),
        lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\s+"}),
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c["added_tokens"][9].update(content="<|eot|>"),
        lambda c: c["added_tokens"].pop(),
        lambda c: c.update(added_tokens=3),
    ],
)
def test_no_tokenizer_model_is_made_of_another_tokenizer(
    converted: Converted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
) -> None:
    folder = shutil.copytree(converted.folder, tmp_path / "a")
    shutil.rmtree(folder / "original")
    changed_json(folder, change)
    run_convert(folder, tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    assert "no tokenizer.model to read text with" in capsys.readouterr().out


def test_neither_library_of_tokenizers_is_needed(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("tokenizers", "sentencepiece"):
        monkeypatch.setitem(sys.modules, library, None)
    run_convert(converted.source, tmp_path / "b")
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (converted.folder / name).read_bytes()


def test_beside_hugging_faces_form_it_is_refused_with_the_remedy(
    converted: Converted, tmp_path: Path
) -> None:
    folder = shutil.copytree(converted.folder, tmp_path / "a")
    (folder / "original" / "tokenizer.model").rename(folder / "tokenizer.model")
    assert load(folder).encode("Hi") == converted.model.encode("Hi")  # by its tokenizer.json
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    without_ids = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(without_ids))
    remedy = r"a/tokenizer\.model: not a SentencePiece .* tools/convert\.py .*/a NEW_DIR --to hf"
    with pytest.raises(InputError, match=remedy):
        load(folder)
    run_convert(folder, tmp_path / "b", "--to", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (converted.folder / name).read_bytes()
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


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
