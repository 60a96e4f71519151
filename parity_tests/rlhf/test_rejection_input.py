"""What a round of rejection sampling is given and cannot use, and what it says to do next."""

import shutil
from pathlib import Path

import pytest

from llama_torch.rejection import main
from llama_torch.rlhf import rejection

from ..support.model_directories import without_ends
from ..support.rejection_rounds import N, flags_of, refused

pytestmark = pytest.mark.numeric


def test_a_model_whose_answers_never_end_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless, out = without_ends(tmp_path / "model"), tmp_path / "out"
    said = refused(flags_of(folder, out, "--model", str(endless)), capsys)
    assert said.startswith(f"--model {endless}: names no end token, so that no answer would end")
    assert not out.exists()


def test_a_round_without_an_answer_to_keep_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It wrote an empty file, and named the command that refuses it."""
    out = tmp_path / "out"
    said = refused(flags_of(folder, out, "--max-new-tokens", "1", "--samples", "1"), capsys)
    assert said.startswith(f"--max-new-tokens 1: of {N} prompts none has an answer that ends and")
    assert not (out / "conversations.jsonl").exists()
    assert (out / "samples.jsonl").exists()


def test_a_model_that_changed_meanwhile_does_not_go_on_with_a_round(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One round would have the scores of two reward models."""
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    for name in ("policy", "reward", "safety"):
        shutil.copytree(folder / name, own / name)
    shutil.copy(folder / "prompts.jsonl", own)
    flags = flags_of(own, out, "--safety-reward", str(own / "safety"))
    assert main(flags) == 0
    assert main([*flags, "--resume"]) == 0
    for flag, name in {"model": "policy", "reward": "reward", "safety-reward": "safety"}.items():
        path = own / name / "model.safetensors"
        before = path.read_bytes()
        path.write_bytes(before[:-8] + bytes(8))  # the last weight is 0
        said = refused([*flags, "--resume"], capsys)
        assert said.startswith(f'--{flag}: was another, "{own / name} (sha256 ')
        path.write_bytes(before)


def test_where_nothing_can_be_written_is_told_before_models_are_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejection, "_load", None)
    prompts = folder / "prompts.jsonl"
    said = refused(flags_of(folder, prompts / "out"), capsys)
    assert said == f"--out {prompts}/out cannot be written below {prompts}; choose another " + (
        "directory"
    )
    wrong = flags_of(folder, folder / "out", "--template", "none.jinja")
    assert refused(wrong, capsys).startswith("--template none.jinja: no such file; give a Jinja")


def test_an_earlier_round_that_is_empty_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").touch()
    said = refused(flags_of(folder, tmp_path / "out", "--earlier", str(tmp_path)), capsys)
    assert said.startswith(f"--earlier {tmp_path}/samples.jsonl: is empty; copy the file again")


def test_the_next_command_has_the_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(flags_of(folder, out, "--template", "llama2")) == 0
    [*_, said] = capsys.readouterr().out.splitlines()
    assert said.split()[2:] == [
        *("llama_torch.sft", "--init-from", str(folder / "policy"), "--template", "llama2"),
        *("--data", str(out / "conversations.jsonl")),
    ]
