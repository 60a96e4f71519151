"""Run the torch trainer's own functions on training cases."""

from typing import Any, NamedTuple

from reference_np import optim

from ..backends.torch_backends import eager
from ..conformance.strategies import Params, cast
from ..conformance.training_cases import (
    TrainingCase,
    max_abs,
)


class Trained(NamedTuple):
    """What k steps leave behind."""

    losses: list[float]
    norms: list[float]
    params: Params
    exp_avg: Params
    exp_avg_sq: Params


def worst(actual: Params, expected: Params) -> float:
    """Return the largest error of a tensor over the largest of all tensors' values.

    Not over its own: one tensor's gradient can vanish (nothing to attend to), and what rounding
    leaves of it says nothing.
    """
    assert actual.keys() == expected.keys()
    scale = max(max_abs(value) for value in expected.values())
    differences = (max_abs(actual[name] - expected[name]) for name in expected)
    return max(differences) / scale if scale > 0 else max(map(max_abs, actual.values()))


def oracle_train(case: TrainingCase, steps: int, dtype: Any, **bug: Any) -> Trained:
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
    """Relative errors of all that training leaves behind."""
    found = {
        "loss": max(abs(a / e - 1) for a, e in zip(actual.losses, expected.losses, strict=True))
    }
    pairs = zip(actual.norms, expected.norms, strict=True)
    # As a model fits its batch the gradient vanishes, by cancellation; its error is what the
    # parameters' rounding makes of it, on the scale of the gradients that moved them.
    found["norm"] = max(abs(a - e) for a, e in pairs) / max(*expected.norms, 1e-12)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        found[kind] = worst(getattr(actual, kind), getattr(expected, kind))
    return found


def torch_grads(case: TrainingCase, dtype: Any) -> tuple[float, Params]:
    """Loss and gradients from the trainer's own accumulation."""
    params, hyper = cast(case.params, dtype), case.hyper
    loss, grads = eager.loss_and_grads(case.config, params, case.batches, hyper.z_loss)
    return loss, dict(grads)


def torch_train(case: TrainingCase, steps: int, dtype: Any) -> Trained:
    """Take ``steps`` steps with the functions that ``python -m llama_torch.train`` runs."""
    params = cast(case.params, dtype)
    found = eager.train(case.config, params, case.batches, case.hyper, steps)
    kinds = ("loss", "grad_norm", "params", "exp_avg", "exp_avg_sq")
    return Trained(*(found[kind] for kind in kinds))
