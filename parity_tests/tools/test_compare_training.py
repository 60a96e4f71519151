"""compare.py --grads: a training step's loss, gradients and update."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison import training_step, training_task
from reference_np.config import LlamaConfig
from reference_np.naming import parameter_shapes
from reference_np.training_mutants import TRAINING

from ..conformance.oracle import Oracle
from ..conformance.strategies import random_params
from ..planted.training import PlantedTrainer
from .comparing import CONFIG, NAMES, QUICK_CALLS, named, write

SHORT = ("--grads", "--tokens", 16, "--steps", 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_and_the_step_agree(ckpt: Path, run: Callable, dtype: str) -> None:
    code, out, _ = run(ckpt, *SHORT, "--dtype", dtype)
    assert code == 0
    n = QUICK_CALLS * (len(NAMES) + (dtype == "float32"))
    n += 1 + 2 + 7 * len(parameter_shapes(CONFIG))
    n += training_task.N_STEPS * (2 + 3 * len(parameter_shapes(CONFIG)))
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} quantities within bounds")


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [(bug, "float64") for bug in ("", *(mutant.name for mutant in TRAINING))]
    # Bugs whose results round worse than the right ones.
    + [(bug, "float32") for bug in ("", "softmax_diagonal", "adam_eps_inside", "clip_each")],
)
def test_a_planted_training_bug_is_named(
    tmp_path: Path, report: Callable, offer: Callable, bug: str, dtype: str
) -> None:
    """The bug is planted in torch, under autograd; the forward pass is right."""
    config = LlamaConfig(16, 1, 4, 2, 4, 24, 60, tie_embeddings=bug == "embedding_forgotten")
    path = write(tmp_path / "x.safetensors", config)
    spec = offer(PlantedTrainer(bug))
    argv = (path, "--grads", "--against", spec, "--dtype", dtype, "--tokens", 32, "--steps", 0)
    found = report(*argv)
    assert [row for row in found["rows"] if row["status"] != "ok"] == []
    assert found["verdict"]["holds"] == (bug == "")
    assert named(found["training"]) == ([[bug]] if bug else [])
    assert found["training"]["unexplained"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_gradient_is_located(
    ckpt: Path, report: Callable, offer: Callable, dtype: str
) -> None:
    """One KV head's gradient is halved, by no known bug; only its own row diverges."""

    class Lossy(Oracle):
        def loss_and_grads(self, *arguments: Any) -> Any:
            loss, grads = super().loss_and_grads(*arguments)
            wrong = grads["model.layers.1.self_attn.k_proj.weight"].copy()
            wrong[:8] *= 0.5
            return loss, {**grads, "model.layers.1.self_attn.k_proj.weight": wrong}

    argv = (ckpt, *SHORT, "--dtype", dtype, "--against", offer(Lossy()))
    found = report(*argv)["training"]
    wrong = [row["name"] for row in found["rows"] if row["status"] == "diverges"]
    assert wrong == ["grad model.layers.1.self_attn.k_proj.weight"]
    assert found["unexplained"] == 1


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_overflowed_in_the_baseline_excuses_no_step(bad: float) -> None:
    config = LlamaConfig(16, 1, 2, 1, 8, 24, 60)
    params = random_params(config, 0)
    task = training_task.Task(config, training_task.make_batches(np.arange(16)), {}, 0.0)
    made = training_step.gradients(task, params)
    task = task._replace(clip_limits=training_task.clip_limits(made[1]))
    exact = training_step.step_values(task, params, made, trains=True)
    name = "model.layers.0.mlp.up_proj.weight"
    baseline = exact | {f"grad {name}": np.full_like(exact[f"grad {name}"], bad)}
    wrong = {n: x * (1.5 if n.endswith(f"step {name}") else 1.0) for n, x in exact.items()}
    names = training_task.quantity_names([*params], trains=True)
    steps = {f"{run} step {name}" for run in training_task.RUNS}
    for theirs, expected in ((exact, set()), (wrong, steps)):
        rows = training_step.compare_step(task, "float32", theirs, exact, baseline, names)
        assert {row.name for row in rows if row.status != "ok"} == expected


def test_a_missing_gradient_fails(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Forgetful(Oracle):
        def loss_and_grads(self, *arguments: Any) -> Any:
            loss, grads = super().loss_and_grads(*arguments)
            return loss, {n: g for n, g in grads.items() if "layers.1.mlp.up" not in n}

    code, out, _ = run(ckpt, *SHORT, "--against", offer(Forgetful()))
    assert code == 1
    assert "first divergence at grad model.layers.1.mlp.up_proj.weight" in out
    assert "(missing)" in out
