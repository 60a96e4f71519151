"""Runs of reward models: the trainer's own loop, on pairs of answers."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import evaluate, generate, reward, sft
from llama_torch.checkpoint.hf import load_model, load_reward_model
from llama_torch.export import main as export
from llama_torch.finetuning_config import RewardConfig
from llama_torch.model.pair_loss import scores_at
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training import loop, throughput
from tools import rank_pairs

from ..support.model_directories import CONFIGS
from ..support.pairs import sums, write_pairs
from ..support.tokenizers import turns
from ..support.trainer_runs import refused_line, scalars, state_file, stop_after

FLAGS = [
    *("--batch-size", "2", "--grad-accum", "3", "--eval-every", "2", "--save-every", "2"),
    *("--lr", "1e-3", "--device", "cpu", "--dtype", "float32", "--max-seq-len", "64"),
]


@pytest.fixture(scope="module", autouse=True)
def _unmeasured() -> Iterator[None]:
    """Spare the measurement of the processor's peak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "peak_flops", lambda *_: 1e9)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "sums.jsonl", sums())


def flags_of(model: Path, data: str, *more: str) -> list[str]:
    return [*FLAGS, "--init-from", str(model), "--data", data, *more]


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "whole"
    assert reward.main([*flags_of(models["bytes"], data), "--out", str(out)]) == 0
    return out


refused = partial(refused_line, reward.main)


def test_the_defaults_are_the_papers() -> None:
    config = RewardConfig()
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.final_lr_ratio) == (1e-5, 0.1, 0.1)
    assert (config.windows_per_step, config.epochs, config.longest_window) == (512, 1, 4096)
    assert [config.with_steps(n).optim.warmup_steps for n in (1, 100, 167, 1000)] == [5, 5, 6, 30]
    given = RewardConfig(optim=type(optim)(warmup_steps=2))
    assert given.with_steps(1000).optim.warmup_steps == 2


def test_the_trunk_is_the_models_and_the_head_is_drawn(
    models: dict[str, Path], data: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = flags_of(models["bytes"], data, "--lr", "1e-30", "--weight-decay", "0")
    assert reward.main([*flags, "--out", str(out)]) == 0
    before, after = load_model(models["bytes"]), load_reward_model(out)
    theirs = before.model.state_dict()
    for name, value in after.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    head = after.head_weight
    assert head.shape == (1, CONFIGS["bytes"].dim)
    assert 0.005 < head.std() < 0.05


def test_a_run_leaves_a_directory_that_transformers_scores_with(
    models: dict[str, Path], data: str, tmp_path: Path
) -> None:
    """GPT-2's end token is its only special one, and would pad: the score is read at it."""
    transformers = pytest.importorskip("transformers")
    out, model = tmp_path / "run", models["gpt2"]
    assert reward.main([*flags_of(model, data, "--template", "llama2"), "--out", str(out)]) == 0
    tokenizer = load_tokenizer(model, CONFIGS["gpt2"].vocab_size)
    template = load_jinja(out, tokenizer)
    talks = [turns([f"Count to {i}", " ".join(map(str, range(i)))]) for i in (2, 5, 9)]
    rows = [template.encode(talk, prompts=False) for talk in talks]
    for folder in (out, out / "best"):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        pad, width = config["pad_token_id"], max(map(len, rows))
        assert pad != rows[0][-1] == tokenizer.special[tokenizer.eos or ""]
        ours = load_reward_model(folder)
        hidden = [ours.model(torch.tensor([row]))[0] for row in rows]
        ends = [torch.tensor([len(row) - 1]) for row in rows]
        each = [scores_at(h, ours.head_weight, i) for h, i in zip(hidden, ends, strict=True)]
        scores = torch.cat(each)
        peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        torch.testing.assert_close(peer(ids).logits[:, 0], scores, rtol=1e-5, atol=1e-5)
        assert scores.std() > 0.01


def test_it_learns_and_says_how_well_by_strength(
    models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["--val-data", data, "--epochs", "6", "--lr", "1e-2", "--margin", "none"]
    assert reward.main([*flags_of(models["bytes"], data, *more), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{data}: 24 pairs, 24 held out; conversations of " in said
    assert "of them 6 significantly better, 6 better, 6 slightly better, 6 strength not gi" in said
    assert "6 epochs in 24 steps of 6 pairs" in said
    assert "scored at the last token of each conversation: --data" in said
    table = said[said.index("accuracy  ") :].splitlines()
    assert table[0].split("  ")[0] == "accuracy"
    assert [line[:22].strip() for line in table[1:6]] == [
        *("significantly better", "better", "slightly better", "strength not given", "together"),
    ]
    assert table[5].split()[1:] == ["100.0%", "of", "24", "100.0%", "of", "8", "100.0%", "of", "16"]
    assert "validation loss" in table[6]
    logged = scalars(out)
    assert [step for step, _ in logged["train/accuracy"]] == [*range(1, 25)]
    assert logged["val/accuracy"][-1][1] == 1
    assert logged["val/gap"][0][1] < 1 < logged["val/gap"][-1][1]
    assert "val/perplexity" not in logged


def test_the_tool_ranks_as_the_run_did(
    models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [*flags_of(models["bytes"], data, "--val-data", data, "--margin", "none")]
    assert reward.main([*flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    table = said[said.index("accuracy  ") : said.index("finished in")]
    assert rank_pairs.main([str(out), data, "--batch-size", "5"]) == 0
    found = capsys.readouterr().out
    assert found.startswith(table)
    loss = said.rpartition("validation loss ")[2].split(",")[0]
    assert found.splitlines()[-1].startswith(f"loss without a margin {loss}  accuracy ")
    for argv, message in (
        ([str(models["bytes"]), data], "is no reward model, which has a head score.weight"),
        ([str(out), str(tmp_path / "no.jsonl")], "PAIRS"),
        ([str(tmp_path), data], "error: "),
    ):
        assert rank_pairs.main(argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    stop_at: int,
    whole: Path,
    models: dict[str, Path],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(models["bytes"], model)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert reward.main([*flags_of(model, data), "--out", str(out)]) == 130
    if state_file(out).exists():  # nothing of the model's directory is needed any more
        shutil.rmtree(model)
    assert reward.main(["--resume", "--out", str(out), "--num-workers", "1"]) == 0
    one, other = load_file(state_file(whole)), load_file(state_file(out))
    assert one.keys() == other.keys()
    assert any(key.endswith("score.weight") for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "config.json").read_text() == (out / "config.json").read_text()
    first, second = scalars(whole), scalars(out)
    for tag in ("train/loss", "train/accuracy", "train/gap", "train/lr", "val/loss", "val/gap"):
        assert dict(first[tag]) == dict(second[tag])


def test_an_epoch_reads_each_pair_once(
    models: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []
    real = loop.train_step

    def recorded(*given: Any, **more: Any) -> Any:
        batches = given[2]
        seen.append([tuple(row[: last + 1].tolist()) for b in batches for row, last in _rows(b)])
        return real(*given, **more)

    monkeypatch.setattr(loop, "train_step", recorded)
    flags = flags_of(models["bytes"], data, "--batch-size", "5", "--grad-accum", "2")
    assert reward.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert [len(step) for step in seen] == [20, 20, 6]  # rows of 23 pairs
    rows = [row for step in seen for row in step]
    assert len(set(zip(rows[::2], rows[1::2], strict=True))) == 23
    for step in seen:  # the longest pairs first
        longest = [max(map(len, pair)) for pair in zip(step[::2], step[1::2], strict=True)]
        assert longest == sorted(longest, reverse=True)


def _rows(batch: Any) -> Any:
    return zip(batch.tokens, batch.targets[:, 0], strict=True)


def test_the_safety_loss_moves_the_signs(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both answers of a pair may be safe, or neither: their order says nothing of that."""
    pairs = [one | {"chosen_safe": False, "rejected_safe": False} for one in sums()]
    data = write_pairs(tmp_path / "a.jsonl", pairs)
    out, flags = tmp_path / "run", flags_of(models["bytes"], data, "--safety-loss", "1")
    assert reward.main([*flags, "--epochs", "4", "--lr", "1e-2", "--out", str(out)]) == 0
    said = dict(scalars(out)["val/loss"])
    assert max(said) == 16
    assert said[16] < said[0] - 0.3
    unlabelled = flags_of(models["bytes"], write_pairs(tmp_path / "b.jsonl", sums()))
    flags = [*unlabelled, "--safety-loss", "1", "--out", str(tmp_path / "no")]
    assert "--safety-loss: no pair says whether its answers are safe" in refused(flags, capsys)


def test_long_pairs_are_counted_and_left_out(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "Count", "chosen": "1 " * 90, "rejected": "No."}
    path = write_pairs(tmp_path / "a.jsonl", [*sums(), long, long | {"rejected": "No"}])
    flags = flags_of(models["bytes"], path, "--out", str(tmp_path / "run"))
    assert reward.main([*flags, "--dry-run", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "longer than 64 tokens: 2 pairs, left out" in said
    assert "6 pairs a step" in said
    assert not (tmp_path / "run").exists()
    write_pairs(tmp_path / "a.jsonl", [long, long | {"rejected": "No"}])
    error = refused(flags, capsys)
    assert f"--max-seq-len 64: --data {path}: line 1 is longer, as every other pair is" in error


def test_a_checkpoint_is_exported_and_no_command_takes_it_for_a_language_model(
    whole: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(whole), "--to", str(tmp_path / "e")]) == 0
    one, other = (load_file(f / "model.safetensors") for f in (whole, tmp_path / "e"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "e/config.json").read_text() == (whole / "config.json").read_text()
    for main, argv in (
        (generate.main, ["--ckpt", str(whole), "--prompt", "x"]),
        (sft.main, ["--init-from", str(whole), "--data", data]),
        (reward.main, ["--init-from", str(whole), "--data", data]),
    ):
        assert main(argv) == 2
        assert "is a reward model, which scores answers and writes none" in capsys.readouterr().err
    assert evaluate.main(["--ckpt", str(whole)]) == 2
    assert "of conversations, not of text; name a text with --data" in capsys.readouterr().err


REFUSED = {
    "--sample-every 5": "--sample-every must be left out",
    "--verify-every 5": "--verify-every",
    "--z-loss 0.1": "--z-loss",
    "--tp 2": "--tp",
    "--precision fp8": "--precision",
    "--margin huge": "--margin",
    "--safety-loss -1": "--safety-loss must be zero or positive",
    "--epochs 0": "--epochs",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_a_reward_model_has_no_use_for_is_refused(
    flag: str, models: dict[str, Path], data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flag.split()[0] in refused(flags_of(models["bytes"], data, *flag.split()), capsys)


def test_a_template_that_writes_both_answers_alike_is_refused(
    models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    said = refused(flags_of(models["bytes"], data, "--template", str(template)), capsys)
    assert f"{data}: line 1: --template {template} writes the chosen and the rejected answ" in said
    flags = ["--init-from", str(models["bytes"])]
    assert "--data is missing: name the files of pairs" in refused(flags, capsys)
