"""Evaluation without --data: a run's own held-out text, named; nothing where there is no run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import evaluate, train
from llama_torch.data.corpus import Corpus, Part, Source
from llama_torch.inference.config import LoadConfig
from llama_torch.tokenizer.gpt2 import END_OF_TEXT_ID
from llama_torch.tokenizer.tokenizer import Gpt2
from llama_torch.training import held_out

from ..support.trainer_runs import SMALL_RUN, TEXT

pytestmark = pytest.mark.numeric

RUN = [*SMALL_RUN, "--steps", "1", "--sample-every", "0"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in ``run`` on the relative path t/a.txt; the working directory is another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here/t").mkdir(parents=True)
    (tmp_path / "here/t/a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    assert train.main([*RUN, "--data", "t", "--val-fraction", "0.2", "--out", "../run"]) == 0
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def n_held_out(text: str, fraction: float) -> int:
    return int((len(Gpt2().encode(text)) + 1) * fraction)


@pytest.mark.parametrize("name", [".", "model.safetensors", "best", "best/model.safetensors"])
def test_the_held_out_part_is_measured_and_named(
    name: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert evaluate.main(["--ckpt", str(run / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    n = n_held_out(TEXT, 0.2)
    where = run.parent / "here/t"
    assert found["text"] == f"the part that the run held out of {where} ({n:,} tokens)"
    assert (found["documents"], found["tokens"]) == (1, n - 1)  # but for its end token
    monkeypatch.chdir(run / Path(name) if (run / name).is_dir() else (run / name).parent)
    assert evaluate.main(["--ckpt", "."]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"text           {found['text']}"


def test_a_text_that_is_named_is_named_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.txt").write_text("A text.")
    capsys.readouterr()
    assert evaluate.main(["--ckpt", str(run), "--data", "b.txt", "here/t/a.txt"]) == 0
    assert capsys.readouterr().out.startswith("text           b.txt, here/t/a.txt\n")


def test_a_run_on_the_built_in_text_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert train.main([*RUN, "--val-fraction", "0.002", "--out", out]) == 0
    capsys.readouterr()
    assert evaluate.main(["--ckpt", out]) == 0
    text = "text           the part that the run held out of Python's help topics (built in) ("
    assert capsys.readouterr().out.startswith(text)


def refused(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert evaluate.main(["--ckpt", str(ckpt)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notes, error = captured.err.splitlines()
    assert all(line.startswith("note: --data") for line in notes)
    assert error.startswith("error: ")
    return str(error)


def test_a_place_names_a_run_whose_name_has_braces(run: Path) -> None:
    moved = run.rename(run.parent / "{a}{}")
    config = evaluate.EvaluateConfig(LoadConfig(ckpt=str(moved)))
    assert evaluate.find_text(config).place(3) == f"{moved}/run.json: held-out document 3"


def test_a_text_that_has_changed_or_gone_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run.parent / "here/t/a.txt"
    text.write_text(TEXT + "More.")
    assert f"error: {run}/run.json: the text of its --data has changed" in refused(run, capsys)
    shutil.rmtree(text.parent)
    said = refused(run, capsys)
    assert f"error: {run}/run.json: --data t: no file found in {run.parent} nor in" in said


def test_a_model_of_no_run_asks_for_a_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = run.parent / "alone"
    shutil.copytree(run / "best", alone)
    assert f"--data is missing, and {alone} belongs to no run" in refused(alone, capsys)
    assert f"{run}/none: no such file" in refused(run / "none", capsys)
    (run / "run.json").write_text("{}")
    assert f"{run}/run.json: is not this package's" in refused(run, capsys)


@given(
    texts=st.lists(st.text("aé 🦙.\n", min_size=1, max_size=12), min_size=1, max_size=5),
    cut=st.integers(0, 8),
    chunk=st.integers(1, 9),
)
def test_documents_are_those_between_the_end_tokens(texts: list[str], cut: int, chunk: int) -> None:
    """In chunks of any size; the first document may begin within a character."""
    ids = [id_ for text in texts for id_ in [*Gpt2().encode(text), END_OF_TEXT_ID]]
    first = len(Gpt2().encode(texts[0]))
    cut = min(cut, first)
    part = Part(np.array(ids, dtype=np.uint16), cut, len(ids))
    corpus = Corpus((Source(part, part, "a"),), (1.0,), "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "CHUNK", chunk)
        found = list(held_out.held_out_documents(corpus, Gpt2()))
    assert found[1:] == texts[1:]
    assert texts[0].endswith(found[0])
    assert len(found[0]) >= len(texts[0]) - len(Gpt2().decode(ids[:cut]))
