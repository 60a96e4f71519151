"""Training steps of the oracle and of the torch trainer on a training case, and their distance."""

from typing import Any, NamedTuple

from reference_np import optim

from ..backends.torch_backends import eager
from ..conformance.strategies import Params, cast
from ..conformance.training_cases import (
    TrainingCase,
    max_abs,
)


class Trained(NamedTuple):
    """The results of k optimizer steps: per step losses and norms, then parameters and moments."""

    losses: list[float]
    norms: list[float]
    params: Params
    exp_avg: Params
    exp_avg_sq: Params


def worst(actual: Params, expected: Params) -> float:
    """Return the largest error of all tensors over the largest value of all tensors.

    Not relative to each tensor: one tensor's gradient can vanish (no key to attend to) and be
    nothing but rounding.
    """
    assert actual.keys() == expected.keys()
    scale = max(max_abs(value) for value in expected.values())
    differences = (max_abs(actual[name] - expected[name]) for name in expected)
    return max(differences) / scale if scale > 0 else max(map(max_abs, actual.values()))


def oracle_train(case: TrainingCase, steps: int, dtype: Any, **bug: Any) -> Trained:
    """Take ``steps`` steps of the oracle in ``dtype``; ``bug`` has train_step's vjps or rules."""
    params = cast(case.params, dtype)
    state = optim.init_state(params)
    losses, norms = [], []
    for _ in range(steps):
        params, state, metrics = optim.train_step(
            params, state, case.batches, case.config, case.hyper, **bug
        )
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    assert state.step == steps
    assert all(value.dtype == dtype for value in params.values())
    return Trained(losses, norms, params, state.exp_avg, state.exp_avg_sq)


def distances(actual: Trained, expected: Trained) -> dict[str, float]:
    """Return the relative errors of losses, norms, parameters and moments, by name."""
    errors = {
        "loss": max(abs(a / e - 1) for a, e in zip(actual.losses, expected.losses, strict=True))
    }
    pairs = zip(actual.norms, expected.norms, strict=True)
    # As a model fits its batch the gradient vanishes, by cancellation; its error is what the
    # parameters' rounding makes of it, on the scale of the gradients that moved them.
    errors["norm"] = max(abs(a - e) for a, e in pairs) / max(*expected.norms, 1e-12)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        errors[kind] = worst(getattr(actual, kind), getattr(expected, kind))
    return errors


def torch_grads(case: TrainingCase, dtype: Any) -> tuple[float, Params]:
    """Return loss and gradients of the torch trainer's accumulation, in ``dtype``."""
    params, hyper = cast(case.params, dtype), case.hyper
    loss, grads = eager.loss_and_grads(case.config, params, case.batches, hyper.z_loss)
    return loss, dict(grads)


def torch_train(case: TrainingCase, steps: int, dtype: Any) -> Trained:
    """Take ``steps`` steps in ``dtype`` by the functions of ``python -m llama_torch.train``."""
    params = cast(case.params, dtype)
    results = eager.train(case.config, params, case.batches, case.hyper, steps)
    kinds = ("loss", "grad_norm", "params", "exp_avg", "exp_avg_sq")
    return Trained(*(results[kind] for kind in kinds))
