"""Rounds of rejection sampling that are interrupted, go on, or are refused."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_torch.rejection import main
from llama_torch.rlhf import rejection
from llama_torch.rlhf.rejection_folder import Sampled

from ..support.rejection_rounds import K, N, flags_of, lines_of, refused, same_round

pytestmark = pytest.mark.numeric

# Interruptions


def test_an_interrupted_round_goes_on_to_the_same_samples(
    folder: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, drawn = tmp_path / "out", rejection._sampled

    def interrupted(*given: Any) -> Iterator[Sampled]:
        yield from itertools.islice(drawn(*given), 2)
        raise KeyboardInterrupt

    flags = flags_of(folder, out, "--rows", "2")
    with monkeypatch.context() as patch:
        patch.setattr(rejection, "SCORED_AT_ONCE", 1)
        patch.setattr(rejection, "_sampled", interrupted)
        assert main(flags) == 130
        told = capsys.readouterr().err.splitlines()[-2:]
        assert told == [f"2 of {N} prompts are in {out}; --resume draws the others", "interrupted"]
        part = out / "samples.part.jsonl"
        assert len(lines_of(part)) == 2
        with part.open("a") as file:
            file.write('{"messages": [{"role": "user", "con')  # a kill amid a line
        assert main([*flags, "--resume"]) == 130
    assert len(lines_of(part)) == 4
    assert not (out / "samples.jsonl").exists()
    assert not (out / "conversations.jsonl").exists()
    assert "is there already; name a new folder" in refused(flags, capsys)
    assert main([*flags, "--resume"]) == 0
    assert same_round(lines_of(out / "samples.jsonl"), lines_of(whole / "samples.jsonl"))
    kept = (out / "conversations.jsonl").read_bytes()
    assert kept == (whole / "conversations.jsonl").read_bytes()
    assert not part.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seed", "5"), "--seed: was another, 0, when "),
        (("--temperature", "1"), "--temperature: was another, 1.2, when "),
        (("--safety-reward", "safety"), '--safety-reward: was another, "", when '),
        (("--prompts", "other.jsonl"), "--prompts: was another when "),
    ],
)
def test_a_resumed_round_has_the_settings_that_it_began_with(
    more: tuple[str, str],
    said: str,
    folder: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "other.jsonl").write_text('{"prompt": "Count"}\n')
    monkeypatch.chdir(folder)
    assert refused(flags_of(folder, whole, "--resume", *more), capsys).startswith(said)


# What is refused


def test_what_is_no_round_is_refused(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "holds no rejection.json" in refused(flags_of(folder, out, "--resume"), capsys)
    earlier = flags_of(folder, out, "--earlier", str(folder))
    assert "holds no samples.jsonl, which a finished round" in refused(earlier, capsys)
    (tmp_path / "samples.jsonl").write_bytes((whole / "samples.jsonl").read_bytes())
    earlier[-1] = str(tmp_path)
    good = (whole / "samples.jsonl").read_text().splitlines()[0]
    for wrong in ("{", '{"messages": []}', good.replace('"ended"', '"end"'), good[:-3]):
        (tmp_path / "samples.jsonl").write_text(f"{good}\n{wrong}\n")
        assert f"{tmp_path}/samples.jsonl: line 2" in refused(earlier, capsys)
    text = json.loads(good)
    text["samples"][0]["answer"] = "another"
    (tmp_path / "samples.jsonl").write_text(json.dumps(text) + "\n")
    assert "was drawn with another tokenizer" in refused(earlier, capsys)
    assert not out.exists()


def test_two_processes_do_not_write_one_folder(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rejection.locked(whole):
        said = refused(flags_of(folder, whole, "--resume"), capsys)
    assert said == f"--out {whole}: another process writes there; wait, or end it"


def test_prompts_that_are_equal_or_too_long_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "a.jsonl"
    texts = ["Count", "word " * 60, "Count", "Sort"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = flags_of(folder, tmp_path / "out")
    flags[flags.index("--prompts") + 1] = str(prompts)
    assert main(flags) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"2 prompts, {K} answers to each at temperature 1.2; ")
    assert "1 prompts left out, too long for the context" in said.out
    assert "note: --prompts: 1 prompts are there twice, and answered once" in said.err
