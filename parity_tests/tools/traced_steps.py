"""Training steps of a trainer in torch, their results, and traces of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import Step
from reference_np import optim
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import parameter_shapes
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters

from ..planted.training import PlantedTrainer

CONFIG = LlamaConfig(16, 1, 4, 2, 4, 24, 60)
N = len(parameter_shapes(CONFIG))
HYPER = Hyperparameters(lr=1e-3, grad_clip=0.05, warmup_steps=0, steps=9, z_loss=1e-4)
RNG = np.random.default_rng(0)
Results = Sequence[dict[str, np.ndarray]]


def batch(shape: tuple[int, int], ignored: float) -> Batch:
    tokens, targets = (RNG.integers(0, 60, shape) for _ in range(2))
    return Batch(tokens, np.where(RNG.random(shape) < ignored, IGNORE, targets))


STEPS = [Step([batch((2, 9), 0.3), batch((1, 7), 0.0)]), Step([batch((2, 8), 0.1)])]


def trained(
    path: Path, bug: str = "", dtype: str = "float32", n: int = 2, hyper: Hyperparameters = HYPER
) -> Results:
    """Return the results of steps of a trainer in torch, whose bug is planted under autograd."""
    trainer, params = PlantedTrainer(bug), dict(Checkpoint(path, dtype))
    found = []
    batches: Any = STEPS[0].batches
    loss, grads = trainer.loss_and_grads(CONFIG, params, batches, HYPER.z_loss)
    done = dict(trainer.train(CONFIG, params, batches, hyper, 1))
    kinds = {"grad": grads, "param": done["params"], "exp_avg": done["exp_avg"]}
    kinds["exp_avg_sq"] = done["exp_avg_sq"] = {
        name: (1 - HYPER.beta2) * (np.asarray(m, np.float64) / (1 - HYPER.beta1)) ** 2
        for name, m in done["exp_avg"].items()  # of clipped gradients, as the trainer shows none
    }
    found.append(results(loss, done["grad_norm"][0], kinds, dtype))
    if n == 2:
        found.append(next_step(done, dtype, hyper))
    return found


def next_step(done: Mapping[str, Any], dtype: str, hyper: Hyperparameters) -> dict[str, np.ndarray]:
    """Return the second step as the oracle takes it in ``dtype`` after a trainer's first."""
    params, m, v = (
        {n: np.asarray(x, dtype) for n, x in done[kind].items()}
        for kind in ("params", "exp_avg", "exp_avg_sq")
    )
    new, state, metrics = optim.train_step(
        params, optim.OptState(1, m, v), STEPS[1].batches, CONFIG, hyper
    )
    kinds = {"grad": metrics.grads, "param": new}
    kinds |= {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return results(metrics.loss, metrics.grad_norm, kinds, dtype)


def results(
    loss: float, norm: float, kinds: Mapping[str, Mapping[str, Any]], dtype: str
) -> dict[str, np.ndarray]:
    found = {"loss": loss, "grad_norm": norm}
    found |= {f"{kind}.{n}": x for kind, values in kinds.items() for n, x in values.items()}
    return {name: np.asarray(x, dtype) for name, x in found.items()}


def traced(
    path: Path,
    values: Results,
    dtype: str = "float32",
    keeps: Callable[[int, str], bool] = lambda s, name: True,
    hyper: Hyperparameters | None = HYPER,
) -> Path:
    """Write a trace of steps alone, beside the checkpoint ``path``."""

    def fill(writer: TraceWriter) -> None:
        for s, found in enumerate(values):
            for name, value in found.items():
                if keeps(s, name):
                    writer.add_step(s, name, value)

    steps = STEPS[: len(values)]
    out = path.with_name("trace.safetensors")
    write_trace(out, CONFIG, [], dtype, fill, steps=steps, hyperparameters=hyper)
    return out
