"""Fine-tuning runs: the trainer's own, on the answers of conversations."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import evaluate, load, sft, train
from llama_torch.checkpoint.hf import load_model
from llama_torch.config import TrainConfig
from llama_torch.finetuning_config import SftConfig
from llama_torch.tokenizer.answers import answer_segments
from llama_torch.tokenizer.chat_template import LLAMA2_SOURCE, ChatTemplate
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training import loop
from llama_torch.training.oracle import oracle_config
from reference_np.grad import loss_and_grads
from reference_np.ops import IGNORE
from reference_np.sft import pack, sft_labels

from ..support.model_directories import CONFIGS
from ..support.tokenizers import turns
from ..support.trainer_runs import refused_line, scalars, state_file, stop_after

FLAGS = [
    *("--batch-size", "2", "--grad-accum", "2", "--eval-every", "2", "--save-every", "2"),
    *("--sample-every", "3", "--lr", "1e-3", "--device", "cpu", "--dtype", "float32"),
    *("--max-seq-len", "64"),
]
NEVER_SAID = "a template without an end"


def conversations(n: int = 24) -> list[list[dict[str, str]]]:
    """Return sums, some of them in two turns."""
    said = [[f"Add {i} and {i + 1}", str(2 * i + 1), "And 1?", str(2 * i + 2)] for i in range(n)]
    return [turns(texts[: 4 if i % 3 == 0 else 2]) for i, texts in enumerate(said)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations())
    path.write_text("".join(lines))
    return path


def flags_of(model: Path, data: Path, *more: str) -> list[str]:
    return [*FLAGS, "--init-from", str(model), "--data", str(data), *more]


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "whole"
    assert sft.main([*flags_of(models["bytes"], data), "--out", str(out)]) == 0
    return out


refused = partial(refused_line, sft.main)


def test_the_defaults_are_the_papers() -> None:
    config = SftConfig()
    assert (config.optim.lr, config.optim.weight_decay, config.epochs) == (2e-5, 0.1, 2)
    assert (config.windows_per_step, config.longest_window) == (64, 4096)
    assert config.optim.warmup_steps == 0  # "an initial learning rate of 2e-5"


def test_the_first_loss_is_the_oracles_over_all_answers(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """One step of all windows: the mean over learnt tokens, of each conversation alone."""
    out, model = tmp_path / "run", models["bytes"]
    held_out = ["--val-data", str(data), "--grad-accum", "40", "--epochs", "1"]
    assert sft.main([*flags_of(model, data, *held_out), "--out", str(out)]) == 0
    tokenizer = load_tokenizer(model, CONFIGS["bytes"].vocab_size)
    template = ChatTemplate(load(model).chat_template.source, "own", tokenizer)
    labelled = [sft_labels(answer_segments(template, one)) for one in conversations()]
    expected, _ = loss_and_grads(_arrays(model), pack(labelled), oracle_config(CONFIGS["bytes"]))
    logged = scalars(out)
    assert len(logged["train/loss"]) == 1
    assert dict(logged["train/loss"])[1] == pytest.approx(expected, rel=1e-5)
    assert dict(logged["val/loss"])[0] == pytest.approx(expected, rel=1e-5)


def _arrays(model: Path) -> dict[str, Any]:
    """Return a model's parameters in float64, by name."""
    return {name: p.detach().double().numpy() for name, p in load_model(model).named_parameters()}


def test_a_run_leaves_a_directory_to_chat_with(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "run", models["gpt2"]
    flags = flags_of(model, data, "--template", "llama2", "--steps", "1")
    assert sft.main([*flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "  | <|endoftext|>[INST] Add 0 and 1 [/INST]{+ 1 <|endoftext|>+}<|endoftext|>[INST]" in said
    )
    assert f"learnt of --data {data}: line 1, between {{+ and +}}:" in said
    assert f"{data}: 23 conversations, 1 held out; " in said
    assert "sample: '<|endoftext|>[INST] Add 12 and 13 [/INST]" in said
    assert f"next:\n  python -m llama_torch.chat --ckpt {out}" in said
    for folder in (out, out / "best"):
        assert (folder / "chat_template.jinja").read_text() == LLAMA2_SOURCE
        assert load(folder).chat(turns(["Add 1 and 2"]), max_new_tokens=3).tokens
    assert evaluate.main(["--ckpt", str(out)]) == 2
    assert "of conversations, not of text; name a text with --data" in capsys.readouterr().err


def test_an_end_token_of_the_template_ends_generation(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, template = tmp_path / "run", tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|head|>' + m['role'] + ' ' + m['content'] + '<|/head|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant' }}{% endif %}"
    )
    flags = flags_of(models["bytes"], data, "--template", str(template), "--steps", "1")
    assert sft.main([*flags, "--verify-every", "1", "--out", str(out)]) == 0
    assert "step     1  verified: of the bounds" in capsys.readouterr().out
    found = load(out)
    assert found.tokenizer.special["<|/head|>"] in found.end_ids
    assert found.end_ids > load(models["bytes"]).end_ids
    before = json.loads((models["bytes"] / "generation_config.json").read_text())
    assert before.items() <= json.loads((out / "generation_config.json").read_text()).items()


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    stop_at: int,
    whole: Path,
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(models["bytes"], model)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert sft.main([*flags_of(model, data), "--out", str(out)]) == 130
    if state_file(out).exists():  # nothing of the model's directory is needed any more
        shutil.rmtree(model)
    assert sft.main(["--resume", "--out", str(out), "--num-workers", "1"]) == 0
    one, other = load_file(state_file(whole)), load_file(state_file(out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = scalars(whole), scalars(out)
    for tag in ("train/loss", "train/lr", "val/loss"):
        assert dict(first[tag]) == dict(second[tag])


def test_epochs_are_whole_and_a_longer_run_goes_on(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = json.loads((whole / "run.json").read_text())
    steps = record["settings"]["steps"]
    assert record["task"] == "sft"
    assert steps == record["identity"]["steps"] == len(scalars(whole)["train/loss"])
    out, windows = tmp_path / "run", []
    shutil.copytree(whole, out)
    real = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *a, **k: windows.append(sum(map(_rows, a[2]))) or real(*a, **k)
    )
    assert sft.main(["--resume", "--out", str(out), "--steps", str(steps + 2)]) == 0
    assert windows == [4, 4]
    n_windows = int(re.findall(r"(\d+) windows of 64", said := capsys.readouterr().out)[-1])
    assert f"; {(steps + 2) * 4 / n_windows:.2f} epochs in {steps + 2} steps of 4 windows" in said


def _rows(batch: Any) -> int:
    return len(batch.tokens)


def test_another_commands_run_is_not_resumed(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--resume", "--out", str(whole)]) == 2
    expected = f"continue it with python -m llama_torch.sft --resume --out {whole}"
    assert expected in capsys.readouterr().err
    record = json.loads((whole / "run.json").read_text())
    for task, message in ((TrainConfig.task, "unknown setting"), ("dream", "task is 'dream', not")):
        out = tmp_path / task
        out.mkdir()
        content = {k: v for k, v in (record | {"task": task}).items() if k != "sha256"}
        (out / "run.json").write_text(json.dumps(content))
        assert message in refused(["--resume", "--out", str(out)], capsys)
    said = refused(["--resume", "--out", str(whole), "--val-data", str(data)], capsys)
    assert "another config: a text of --data or --val-data, or the run's own chat template" in said
    said = refused(["--resume", "--out", str(whole), "--epochs", "5"], capsys)
    assert "--epochs is 2 there and 5 here" in said


def test_conversations_beyond_the_context_are_cut_and_counted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = turns(["Add 1 and 2", "3", "Why? " * 30, "So."])
    data = [*conversations(6), long, turns(["Why? " * 30, "So."])]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in data))
    flags = flags_of(models["bytes"], path, "--dry-run")
    assert sft.main(flags) == 0
    assert (
        "longer than 64 tokens: 1 conversations, cut after the last answer to learn that fits, "
        "and 1 left out, of which none does"
    ) in capsys.readouterr().out
    path.write_text((json.dumps({"messages": data[-1]}) + "\n") * 3)
    said = refused(flags, capsys)
    assert f"--max-seq-len 64: the first answer to learn of --data {path}: line 1 ends " in said


def test_answers_of_weight_0_are_prompt_in_a_run_and_its_validation(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Marks, numbers of learnt tokens and first losses are those of the last answers alone."""
    path, model = tmp_path / "weighed.jsonl", models["bytes"]
    given = [turns([f"Add {i} and 1", str(i + 1), "And 1?", str(i + 2)]) for i in range(6)]
    records = [[a, b | {"weight": 0}, c, d | {"weight": 1}] for a, b, c, d in given]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in records))
    flags = flags_of(model, path, "--val-data", str(path), "--grad-accum", "9", "--epochs", "1")
    assert sft.main([*flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    tokenizer = load_tokenizer(model, CONFIGS["bytes"].vocab_size)
    template = ChatTemplate(load(model).chat_template.source, "own", tokenizer)
    labelled = [sft_labels(answer_segments(template, one, [False, True])) for one in given]
    n_learnt = sum(int((targets != IGNORE).sum()) for _, targets in labelled)
    assert f"of which {n_learnt:,} are learnt" in said
    shown = said.partition("between {+ and +}:")[2]
    before, _, learnt = shown.partition("{+")
    assert "And 1?" in before
    assert learnt.startswith("2")
    assert (shown.count("{+"), shown.count("+}")) == (1, 1)
    out = tmp_path / "run"
    assert sft.main([*flags, "--out", str(out)]) == 0
    expected, _ = loss_and_grads(_arrays(model), pack(labelled), oracle_config(CONFIGS["bytes"]))
    assert dict(scalars(out)["train/loss"])[1] == pytest.approx(expected, rel=1e-5)
    assert dict(scalars(out)["val/loss"])[0] == pytest.approx(expected, rel=1e-5)


REFUSED = {
    NEVER_SAID: (
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
        None,
        "line 1: --template {template}: ends answer 1 with '1\\n' and no special token",
    ),
    "one conversation": ("", 1, "--data: 1 conversation can be used, and one must be held"),
    "none": ("", 0, "--data: 0 conversations can be used, and one must be held"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_from_is_refused(
    name: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, n, message = REFUSED[name]
    template, path, out = tmp_path / "t.jinja", tmp_path / "a.jsonl", tmp_path / "run"
    template.write_text(source)
    some = conversations()[:n]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in some))
    more = ["--template", str(template)] if source else []
    said = refused([*flags_of(models["bytes"], path, *more), "--out", str(out)], capsys)
    assert message.format(template=template) in said
    assert not out.exists()


def test_what_is_missing_is_named(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--init-from", str(models["bytes"])]
    assert "--data is missing: name the files of conversations" in refused(model, capsys)
    nowhere = [*model, "--data", str(data), "--val-data", str(tmp_path / "no.jsonl")]
    assert f"--val-data {tmp_path / 'no.jsonl'}: no file found" in refused(nowhere, capsys)
    said = refused([*model, "--data", str(data), "--template", "no.jinja"], capsys)
    assert "--template no.jinja: no such file; give a Jinja file, or llama2" in said
    plain = ["--init-from", str(models["gpt2"]), "--data", str(data), "--out", str(tmp_path / "a")]
    assert "has no chat template; give one with --template" in refused(plain, capsys)
    many = [*model, "--data", str(data), "--epochs", str(10**20)]
    assert "--epochs must be below 2^31" in refused(many, capsys)
