"""The oracle as a port, with a bug that few models show."""

from typing import Any

import numpy as np

from reference_np import grad, ops, optim
from reference_np.training_mutants import TRAINING

from ..conformance.oracle import Oracle


class QueriesTransposedWhereSquare(Oracle):
    """The oracle with q_proj transposed in every model whose q_proj is square."""

    def decode(self, config: Any, params: Any, *rest: Any) -> Any:
        read = {
            name: value.T if "q_proj" in name and len(set(value.shape)) == 1 else value
            for name, value in params.items()
        }
        return super().decode(config, read, *rest)


class WrongInTheAdaptersCheckAlone(Oracle):
    """The oracle without the final norm in a model that no check draws."""

    def decode(self, config: Any, params: Any, *rest: Any) -> Any:
        drawn = not config.dim == config.hidden_dim == config.vocab_size == 16
        read = params if drawn else dict(params) | {"model.norm.weight": np.ones(config.dim)}
        return super().decode(config, read, *rest)


class TrainedInFloat32(Oracle):
    """The oracle in float32 alone with a bug of training."""

    dtypes = ("float32",)
    bug: str

    def __init__(self) -> None:
        (mutant,) = (one for one in TRAINING if one.name == self.bug)
        parts = (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES)
        super().__init__(*(mutant.apply(part) for part in parts))


class MeanOfMeansInFloat32(TrainedInFloat32):
    """The mean of the micro-batches' means."""

    bug = "mean_of_means"


class PaddingLearntInFloat32(TrainedInFloat32):
    """Ignored targets learnt as token 0."""

    bug = "padding_learnt"


class ZLossForgottenInFloat32(TrainedInFloat32):
    """The z-loss reported and never differentiated."""

    bug = "z_loss_forgotten"
