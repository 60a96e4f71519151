"""Runs of the trainer: their files and logs, and resumption after a stop."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.hf import load_model

from ..support import state_files
from ..support.trainer_runs import SMALL_RUN, scalars, state_file, stop_after


def test_a_run_leaves_a_model_directory(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"python tools/compare.py {out}/model.safetensors" in printed
    assert f"python -m llama_torch.generate --ckpt {out}" in printed
    assert "sample: 'The" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("run.json", "lock", "tensorboard", "checkpoints", "best"),
    }
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "6"}
    logged = scalars(out)
    assert logged.keys() == {
        *("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"),
        *("train/mfu", "train/peak_memory_gib"),
        *("val/loss", "val/perplexity"),
    }
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged["val/loss"]] == [0, 3, 6]
    assert logged["val/loss"][0][1] == pytest.approx(math.log(50257), abs=0.1)
    assert logged["val/loss"][-1][1] < logged["val/loss"][0][1]
    hf = json.loads((out / "config.json").read_text())
    assert (hf["model_type"], hf["eos_token_id"]) == ("llama", 50256)
    load_model(out)
    load_model(out / "model.safetensors")
    load_model(out / "best")


@pytest.mark.parametrize(
    ("stop_at", "more"),
    [
        (0, ["--sample-prompt=-x"]),
        (1, []),
        (3, ["--grad-accum", "2", "--max-seq-len", "60"]),  # crosses an epoch's end
        (5, ["--dtype", "bfloat16"]),
        (3, ["--num-workers", "1"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, text: str, stop_at: int, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = [*SMALL_RUN, *more, "--data", text]
    assert train.main([*flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert train.main([*flags, "--out", str(parted)]) == 130
    assert state_file(parted).exists() == (stop_at >= 2)
    assert train.main(["--resume", "--out", str(parted)]) == 0
    for name in (f"checkpoints/6/{STATE_FILE}", "model.safetensors", "best/model.safetensors"):
        one, other = load_file(whole / name), load_file(parted / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = scalars(whole), scalars(parted)
    for tag in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert dict(first[tag]) == dict(second[tag])


def test_a_run_begun_before_a_setting_existed_resumes(tmp_path: Path, text: str) -> None:
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    record = state_files.read(out / "run.json")  # without a checksum, as it was written then
    for part in ("identity", "settings"):
        del record[part]["model"]["rope_type"], record[part]["model"]["rope_factor"]
    (out / "run.json").write_text(json.dumps(record))
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert train.main(["--resume", "--out", str(out), "--rope-factor", "2"]) == 2


def test_an_export_torn_from_its_state_is_written_again(tmp_path: Path, text: str) -> None:
    """After a kill between the two files of a checkpoint the export is written from the state."""
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    expected = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.999999999.tmp").write_bytes(b"half")  # no such process
    assert train.main(["--resume", "--out", str(out)]) == 0
    again = load_file(out / "model.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert not list(out.glob("*.tmp"))


def test_a_context_of_one_token_trains_without_samples(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL_RUN, "--max-seq-len", "1", "--data", text, "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert "(no sample: the context holds a single token)" in capsys.readouterr().out


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path, text: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    flags = [*SMALL_RUN, "--data", text, "--batch-size"]
    assert train.main([*flags, "4", "--out", str(one)]) == 0
    assert train.main([*flags, "2", "--grad-accum", "2", "--out", str(other)]) == 0
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-6)
