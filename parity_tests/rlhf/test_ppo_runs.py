"""Runs of PPO: resumed, stopped, exported, refused; and the sampler beside the trainer."""

import json
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llama_torch import ppo
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.hf import load_model
from llama_torch.checkpoint.state_interface import PARAMETER
from llama_torch.export import main as export
from llama_torch.ppo_config import PpoConfig
from llama_torch.rlhf import ppo_rollouts, ppo_source
from llama_torch.training import throughput
from llama_torch.training.batch import Batch
from reference_np.model import forward
from reference_np.tolerances import composed_bound, errors

from ..support.ppo_runs import RUN, Models, oracle_config, write_models
from ..support.survival import call_before, require_same, send_signal
from ..support.trainer_runs import refused_line, scalars, state_file, stop_after

GROUPS = ["--advantages", "group", "--group", "2"]


@pytest.fixture(scope="module", autouse=True)
def _unmeasured() -> Iterator[None]:
    """Spare the measurement of the processor's peak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "peak_flops", lambda *_: 1e9)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, with a value function and with groups."""
    found = {}
    for name, more in {"value": [], "group": GROUPS}.items():
        found[name] = tmp_path_factory.mktemp(name) / "run"
        assert ppo.main([*flags_of(models, *more), "--out", str(found[name])]) == 0
    return found


def flags_of(models: Models, *more: str) -> list[str]:
    return [
        *RUN,
        *models.flags,
        "--eval-every",
        "2",
        "--sample-every",
        "4",
        "--save-every",
        "1",
        *more,
    ]


refused = partial(refused_line, ppo.main)


def test_the_defaults_are_the_papers() -> None:
    config = PpoConfig()
    optim = config.optim
    assert (optim.lr, optim.final_lr_ratio, optim.warmup_steps) == (1e-6, 1.0, 0)
    assert (optim.beta1, optim.beta2, optim.adam_eps) == (0.9, 0.95, 1e-5)
    assert (optim.weight_decay, optim.grad_clip) == (0.1, 1.0)
    assert (config.rollout_batch, config.windows_per_step, config.steps) == (512, 64, 200 * 8)
    assert (config.kl_weight, config.policy_clip, config.temperature) == (0.01, 0.2, 1.0)


@pytest.mark.parametrize("kind", ["value", "group"])
@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    stop_at: int,
    kind: str,
    whole: dict[str, Path],
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted amid the answers of a batch, it begins again where that was drawn."""
    out = tmp_path / "run"
    more = GROUPS if kind == "group" else []
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert ppo.main([*flags_of(models, *more), "--out", str(out)]) == 130
    assert state_file(out).exists() == (stop_at == 5)
    assert ppo.main(["--resume", "--out", str(out)]) == 0
    require_same(whole[kind], out)
    first, second = scalars(whole[kind]), scalars(out)
    for tag in ("train/reward", "train/kl", "train/entropy", "train/mismatch", "val/reward"):
        assert dict(first[tag]) == dict(second[tag])


def test_a_signal_ends_the_run_after_the_answers_in_hand(
    whole: dict[str, Path],
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        call_before("train_step", 2, lambda: send_signal(signal.SIGTERM), patch)
        assert ppo.main([*flags_of(models), "--out", str(out)]) == 143
    assert "step 3" in capsys.readouterr().err
    assert step_folders.newest(out) == out / "checkpoints" / "3"
    assert ppo.main(["--resume", "--out", str(out)]) == 0
    require_same(whole["value"], out)


def test_a_run_leaves_a_language_model_without_the_value_head(
    whole: dict[str, Path], models: Models, tmp_path: Path
) -> None:
    out = whole["value"]
    state = load_file(state_file(out))
    assert state[PARAMETER + "value.weight"].shape == (1, 16)
    given = {*load_model(models.policy).state_dict()}
    assert export([str(out), "--to", str(tmp_path / "e")]) == 0
    for folder in (out, out / "best", tmp_path / "e"):
        assert {*load_file(folder / "model.safetensors")} == given
        assert {*load_model(folder).state_dict()} == given
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert PARAMETER + "value.weight" not in load_file(state_file(whole["group"]))


def test_transformers_loads_it(whole: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    peer, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(whole["value"]),
        load_model(whole["value"]),
    )
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(peer(ids).logits, ours(ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.numeric
def test_the_sampler_and_the_trainer_agree_within_float32(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are within the bound of the logits; a difference of two logits has twice its error."""
    drawn = []
    real = ppo_rollouts.to_windows

    def recorded(found: ppo_rollouts.Drawn, *given: object) -> torch.Tensor:
        drawn.append(found)
        return real(found, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ppo_source, "to_windows", recorded)
    flags = flags_of(models, "--steps", "3", "--save-every", "3", "--temperature", "0.8")
    assert ppo.main([*flags, "--out", str(tmp_path / "run")]) == 0
    learnt = max(drawn, key=lambda found: len(found.tokens))
    model = load_model(models.policy, dtype=torch.float64)
    config, tokens = oracle_config(model.config), learnt.tokens.numpy()
    params = {name: p.detach().numpy() for name, p in model.named_parameters()}
    exact, _ = forward(params, tokens, config)
    narrow, _ = forward({n: p.astype(np.float32) for n, p in params.items()}, tokens, config)
    bound = composed_bound(errors(narrow, exact), "float32").worst * np.abs(exact).max()
    logged = dict(scalars(tmp_path / "run")["train/mismatch"])
    assert len({*logged.values()}) == 1
    assert logged[1] == pytest.approx((learnt.sampled - learnt.log_p).abs().max().item(), rel=1e-6)
    assert 0 < logged[1] <= 2 * 2 * bound / 0.8
    assert bound < 1e-4


def test_a_dry_run_tells_the_memory_of_every_model(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(models, "--dry-run", "--safety-reward", str(models.safety))
    assert ppo.main([*flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "16 prompts of " in said
    assert "1 held out" in said
    assert "2 times 12 answers of at most 5 tokens, and 3 steps on them" in said
    for part in ("policy", "gradients and moments", "reference", "reward models", "cache of ans"):
        assert f"{part}" in said[said.index("memory: policy") :]
    assert "the time of steps is without that of drawing" in said
    assert not (tmp_path / "run").exists()


def test_frozen_models_that_changed_or_went_are_told(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Models(*(tmp_path / path.name for path in models))
    for mine, theirs in zip(own[:3], models[:3], strict=True):
        shutil.copytree(theirs, mine)
    shutil.copy(models.prompts, own.prompts)
    out = tmp_path / "run"
    assert ppo.main([*flags_of(own, "--steps", "3"), "--out", str(out)]) == 0
    argv = ["--resume", "--out", str(out), "--steps", "6"]
    (own.reward / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert "a chat template or a frozen model has changed" in refused(argv, capsys)
    (own.reward / "chat_template.jinja").unlink()
    own.policy.rename(tmp_path / "moved")
    assert f"--reference {own.policy}: no such directory" in refused(argv, capsys)
    assert ppo.main([*argv, "--reference", str(tmp_path / "moved")]) == 0


REFUSED = {
    "--rollout-batch 10": "--rollout-batch must be a multiple of the minibatch",
    "--steps 4": "--steps must be a multiple of 3, the minibatches of --rollout-batch",
    "--advantages group --group 3": "--group must divide the minibatch of 4 answers",
    "--advantages group --group 1": "--group must be at least 2: of a single answer nothing is",
    "--rollout-batch 1 --batch-size 1 --grad-accum 1": "--rollout-batch must be at least 2: of a",
    "--sample-rows 9999999999": "--sample-rows must be below 2^20",
    "--temperature 0": "--temperature must be positive",
    "--lam 1.5": "--lam must lie between 0 and 1",
    "--tp 2": "--tp is not for reinforcement learning: leave it out",
    "--fsdp 2": "--fsdp is not for reinforcement learning",
    "--precision fp8": "--precision is not for reinforcement learning",
    "--verify-every 2": "--verify-every is not for reinforcement learning",
    "--kl-weight -1": "--kl-weight must be zero or positive",
    "--max-new-tokens 90": "--max-new-tokens 90: ",
    "--reward README.md": "README.md",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_line(
    words: str, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*flags_of(models, *words.split()), "--out", str(tmp_path / "run")]
    assert REFUSED[words] in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_missing_models_are_named(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--init-from is missing" in refused([], capsys)
    assert "--reward is missing: name the dir" in refused(
        models.flags[:2] + models.flags[4:], capsys
    )
    argv = [*flags_of(models), "--reward", str(models.policy)]
    assert "is no reward model" in refused(argv, capsys)


def test_micro_batches_have_a_few_widths_however_long_the_answers(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile compiles a block for each, and ends a run at the ninth."""
    seen, drawn, sources = set(), set(), []
    real, make = ppo_source.RolloutSource.to_batch, ppo_source.to_windows

    def batched(self: ppo_source.RolloutSource, windows: torch.Tensor) -> Batch:
        batch = real(self, windows)
        seen.add(batch.tokens.shape[1])
        sources.append(self)
        return batch

    def made(found: ppo_rollouts.Drawn, *given: Any) -> torch.Tensor:
        windows = make(found, *given)
        drawn.add(windows.shape[2])
        return windows

    monkeypatch.setattr(ppo_source.RolloutSource, "to_batch", batched)
    monkeypatch.setattr(ppo_source, "to_windows", made)
    flags = ["--max-new-tokens", "40", "--steps", "24", "--save-every", "24", "--lr", "1e-9"]
    flags += ["--eval-every", "24", "--batch-size", "1", "--grad-accum", "4"]
    assert ppo.main([*flags_of(models, *flags), "--out", str(tmp_path / "run")]) == 0
    assert len(drawn) > ppo_source.SHAPES
    assert 2 <= len(seen) <= ppo_source.SHAPES
    example = sources[0].example_windows()
    assert example.shape[2] == sources[0].most >= max(seen)
    assert int((example[:, 1] != -100).sum()) == 4 * 40
