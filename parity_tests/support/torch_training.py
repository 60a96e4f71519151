"""Run the torch trainer's own functions on training cases."""

from typing import Any, NamedTuple

from ..backends.torch_backends import eager
from ..conformance.strategies import (
    Params,
    cast,
)
from ..conformance.training_cases import TrainingCase


def torch_grads(case: TrainingCase, dtype: Any) -> tuple[float, Params]:
    """Loss and gradients from the trainer's own accumulation."""
    params, hyper = cast(case.params, dtype), case.hyper
    loss, grads = eager.loss_and_grads(case.config, params, case.batches, hyper.z_loss)
    return loss, dict(grads)


class Trained(NamedTuple):
    """What k steps leave behind."""

    losses: list[float]
    norms: list[float]
    params: Params
    exp_avg: Params
    exp_avg_sq: Params


def torch_train(case: TrainingCase, steps: int, dtype: Any) -> Trained:
    """Take ``steps`` steps with the functions that ``python -m llama_torch.train`` runs."""
    params = cast(case.params, dtype)
    found = eager.train(case.config, params, case.batches, case.hyper, steps)
    kinds = ("loss", "grad_norm", "params", "exp_avg", "exp_avg_sq")
    return Trained(*(found[kind] for kind in kinds))
