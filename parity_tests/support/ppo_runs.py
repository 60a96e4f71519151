"""Small runs of PPO in float64 through the trainer's loop, and what the oracle makes of them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from llama_common.files import write_json
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.ppo_config import PpoConfig
from llama_torch.rlhf import ppo_rollouts, ppo_task
from llama_torch.rlhf.answers import Answer
from llama_torch.rlhf.ppo_source import RolloutSource
from llama_torch.training import loop, setup, throughput
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.run_dir import resolve_config
from reference_np import divergence, ppo
from reference_np.config import LlamaConfig
from reference_np.ops import IGNORE, Array
from reference_np.optim import Hyperparameters, OptState, init_state
from reference_np.ppo import Drawn, Settings, Update, ppo_batch
from reference_np.reward import combined_score

from .model_directories import write_model
from .reward_models import oracle_scores, write_reward_model

MODEL = ModelConfig(16, 1, 2, 1, 8, 24, 520, 128, 1e-6, 500000.0, True)
REWARD = ModelConfig(16, 1, 2, 1, 8, 24, 400, 96, 1e-5, 10000.0, False)
END_IDS = 160  # so many of the 520 ids end an answer: about every third token
# Two batches of 12 answers, three steps on each, in micro-batches of two.
RUN = [
    *("--rollout-batch", "12", "--batch-size", "2", "--grad-accum", "2", "--steps", "6"),
    *("--max-new-tokens", "5", "--lr", "3e-2", "--kl-weight", "0.3", "--sample-rows", "5"),
    *("--eval-every", "6", "--eval-batches", "1", "--sample-every", "0", "--save-every", "6"),
    *("--device", "cpu", "--dtype", "float32", "--adam-eps", "1e-3", "--grad-clip", "0.5"),
    *("--max-seq-len", "96", "--policy-clip", "0.05"),
]

CLOSE = 1e-9
# What a run asks for beside RUN.
SETTINGS = {
    "paper": [],
    "safety": ["--safety-reward"],
    "warm": ["--temperature", "1.3", "--gamma", "0.9", "--no-whiten-advantages"],
    "loss": ["--kl", "loss", "--mean", "sequence", "--value-weight", "0.7"],
    "cut": ["--unended-penalty", "2", "--lam", "0.5"],
    "group": ["--advantages", "group", "--group", "4"],
    "group-loss": ["--advantages", "group", "--group", "2", "--kl", "loss", "--mean", "sequence"],
}


class Models(NamedTuple):
    """Directories of models, and a file of prompts."""

    policy: Path
    reward: Path  # of another tokenizer and template
    safety: Path
    prompts: Path

    @property
    def flags(self) -> list[str]:
        """The flags that name them, but the safety model."""
        named = {"--init-from": self.policy, "--reward": self.reward, "--data": self.prompts}
        return [word for flag, path in named.items() for word in (flag, str(path))]

    def run(self, name: str) -> list[str]:
        """Return the flags of a run with those SETTINGS."""
        safety = [str(self.safety)] if name == "safety" else []
        return [*RUN, *self.flags, *SETTINGS[name], *safety]


def write_models(folder: Path) -> Models:
    """Write models with random weights, whose scores have some units, and prompts."""
    write_model(folder / "policy", "bytes")
    config = json.loads((folder / "policy" / "config.json").read_text())
    write_json(folder / "policy" / "config.json", config | {"eos_token_id": [*range(1, END_IDS)]})
    reward = write_reward_model(folder / "reward", "pieces", REWARD, 1)
    safety = write_reward_model(folder / "safety", "bytes", MODEL, 2)
    prompts = folder / "prompts.jsonl"
    asked = [f"Count to {i}" + "." * (3 * i % 7) for i in range(1, 18)]
    lines = [{"prompt": text, "safety": i % 4 == 0} for i, text in enumerate(asked)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Models(folder / "policy", reward, safety, prompts)


class Rollout(NamedTuple):
    """What was drawn at once."""

    prompts: Sequence[list[int]]
    answers: list[Answer]
    windows: list[list[tuple[int, ...]]]  # tokens of the answers of each step, in its order


class Ran(NamedTuple):
    """A run of the loop, recorded."""

    config: PpoConfig
    source: RolloutSource
    first: dict[str, Array]  # parameters before the first step
    last: dict[str, Array]
    moments: tuple[dict[str, Array], dict[str, Array]]
    drawn: list[Rollout]
    updates: list[Update]
    measures: list[dict[str, float]]  # of each step, by the objective's names


def parameters_of(model: Llama) -> dict[str, Array]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def run_loop(flags: list[str], out: Path, patch: pytest.MonkeyPatch) -> Ran:
    """Run the trainer's loop on a command line, in float64; return what it drew and learnt."""
    config = replace(parsed(tuple(flags)), out=str(out))
    recorder = Recorder(config, patch)
    patch.setattr(throughput, "peak_flops", lambda *_: 1e9)
    loop.train(config, ppo_task.PpoTask())
    run = recorder.run
    state = {name: run.optimizer.state[p] for name, p in run.model.named_parameters()}
    first, second = (
        {name: own[kind].numpy().copy() for name, own in state.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    )
    given = config, run.source, recorder.first, parameters_of(run.model), (first, second)
    learnt = [one for one in recorder.drawn if one.windows]  # others are of validations
    return Ran(*given, learnt, recorder.updates, recorder.measures)


@cache
def parsed(flags: tuple[str, ...]) -> PpoConfig:
    """Return the config of flags, once for all runs with them: to parse them takes as long."""
    config = resolve_config([*flags, "--out", "runs/none"], PpoConfig)
    assert isinstance(config, PpoConfig)
    return config


class Recorder:
    """Makes the loop's model one of float64; keeps what is drawn and what each step measures."""

    run: Any  # of training.setup

    def __init__(self, config: PpoConfig, patch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.first: dict[str, Array] = {}
        self.drawn: list[Rollout] = []
        self.updates: list[Update] = []
        self.measures: list[dict[str, float]] = []
        self.real = setup.build, ppo_rollouts.draw_answers, loop.train_step, loop.take_steps
        patch.setattr(setup, "build", self.build)
        patch.setattr(ppo_rollouts, "draw_answers", self.draw)
        patch.setattr(loop, "train_step", self.step)
        patch.setattr(loop, "take_steps", self.take_steps)

    def build(self, *given: Any, **more: Any) -> Any:
        model, _ = self.real[0](*given, **more)
        self.first |= parameters_of(model.double())
        return model, make_adamw(model, self.config.optim)

    def draw(self, model: Any, prompts: Any, *given: Any, **more: Any) -> Any:
        answers = sorted(self.real[1](model, prompts, *given, **more))
        self.drawn.append(Rollout(prompts, answers, []))
        return answers

    def step(self, model: Any, optimizer: Any, batches: Any, **more: Any) -> Any:
        loss, norm = self.real[2](model, optimizer, batches, **more)
        objective = more["objective"]
        each = dict(zip(objective.names, objective.latest.tolist(), strict=True))
        numbers = each["value_loss"], norm.item(), each["entropy"], each["clipped"]
        self.updates.append(Update(loss.item(), *numbers))
        self.measures.append(each)
        self.drawn[-1].windows.append([row for b in batches for row in rows_of(b.targets)])
        return loss, norm

    def take_steps(self, run: Any, *given: Any) -> None:
        self.run = run
        self.real[3](run, *given)


def rows_of(targets: torch.Tensor) -> list[tuple[int, ...]]:
    """Return each answer's prompt and own tokens, as windows hold them."""
    found = []
    for row in targets:
        last = int((row[1] != IGNORE).nonzero()[-1])
        found.append((*row[0, : last + 1].long().tolist(), int(row[1, last])))
    return found


def oracle_config(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(**vars(config))


def expected(ran: Ran) -> tuple[dict[str, Array], OptState, list[Update], list[dict[str, float]]]:
    """Return what the oracle makes of the prompts and answers that a run has drawn.

    The parameters, AdamW's state, each step's update, and its mean score, divergence and length.
    """
    assert ran.source.rollouts
    config, model = ran.config, oracle_config(ran.source.rollouts.model.config)
    optim, has_value = config.optim, config.advantages == "value"
    hyper = Hyperparameters(
        *(optim.lr, optim.beta1, optim.beta2, optim.adam_eps, optim.weight_decay, optim.grad_clip)
    )
    settings = Settings(
        *(config.kl_weight, config.kl, config.temperature, config.policy_clip, config.mean),
        *(0 if has_value else config.group, config.gamma, config.lam, config.value_weight),
        config.whiten_advantages,
    )
    reference = {k: v for k, v in ran.first.items() if k != ppo.VALUE}
    params, state = ran.first, init_state(ran.first)
    updates, measures = [], []
    for one in ran.drawn:
        drawn = as_drawn(ran, one, reference, model)
        minibatches = minibatches_of(config)
        log_old = ppo.learn_from(params, drawn, model, settings).log_old
        kl = (log_old - drawn.log_reference).sum(axis=1)
        for numbers in minibatches:
            own = list(numbers)
            lengths = (drawn.targets[own] != IGNORE).sum(axis=1)
            each = {"reward": drawn.scores[own], "kl": kl[own], "length": lengths}
            measures.append({name: float(np.mean(value)) for name, value in each.items()})
        given = model, hyper, settings
        params, state, found = ppo_batch(params, state, drawn, minibatches, *given)
        updates += found
    return params, state, updates, measures


def as_drawn(ran: Ran, one: Rollout, reference: dict[str, Array], config: LlamaConfig) -> Drawn:
    """Return answers as the oracle has them: in its own rows, scored by its own forward pass."""
    pairs = [*zip(one.prompts, one.answers, strict=True)]
    width = max(len(p) + len(a.ids) for p, a in pairs) + 2  # a column of padding for all
    tokens, targets = np.zeros((len(pairs), width), int), np.full((len(pairs), width), IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        ids = [*prompt, *answer.ids]
        tokens[row, : len(ids)] = ids
        targets[row, len(prompt) - 1 : len(ids) - 1] = answer.ids
    given = ran.source.rollouts
    assert given
    known = {tuple(p.ids): p for p in ran.source.train}
    asked = [known[tuple(prompt)] for prompt in one.prompts]
    ended = np.array([answer.ids[-1] in given.end_ids for answer in one.answers])
    scores = {}
    for scorer in filter(None, (given.helpful, given.safe)):
        rows = [scorer.encode(*pair) for pair in zip(asked, one.answers, strict=True)]
        scores[scorer] = np.array(oracle_scores(scorer.model, rows))
    total = scores[given.helpful]
    if given.safe:
        tagged = np.array([prompt.prompt.is_tagged for prompt in asked])
        total = combined_score(total, scores[given.safe], tagged)
    total = total - ran.config.unended_penalty * ~ended
    logits, _, _ = ppo.outputs(reference, tokens, config)
    log_reference = divergence.log_probs(logits, targets, ran.config.temperature)
    return Drawn(tokens, targets, total, log_reference)


def minibatches_of(config: PpoConfig) -> list[range]:
    """Return the answers of each step, by their numbers among those that are drawn at once."""
    size, count = config.windows_per_step, config.steps_at_once
    return [range(i * size, (i + 1) * size) for i in range(count)]


def distance(ran: Ran) -> float:
    """Return the largest difference from the oracle: of weights, moments, losses and measures.

    Infinite where a step has not read the answers that were drawn for it.
    """
    for one in ran.drawn:
        rows = [(*p, *a.ids) for p, a in zip(one.prompts, one.answers, strict=True)]
        for numbers, seen in zip(minibatches_of(ran.config), one.windows, strict=True):
            if sorted(seen) != sorted(rows[i] for i in numbers):
                return float("inf")
    params, state, updates, measures = expected(ran)
    assert ran.last.keys() == params.keys()
    pairs = [
        *((ran.last[name], value) for name, value in params.items()),
        *((ran.moments[0][name], value) for name, value in state.exp_avg.items()),
        *((ran.moments[1][name], value) for name, value in state.exp_avg_sq.items()),
        *zip(ran.updates, updates, strict=True),
        *(
            (mine[name], value)
            for mine, theirs in zip(ran.measures, measures, strict=True)
            for name, value in (*theirs.items(), ("mismatch", 0.0))
        ),
    ]
    return max(float(np.abs(np.subtract(mine, theirs)).max()) for mine, theirs in pairs)
