"""The oracle itself as a backend: honest, with a bug, or rounding as a plain implementation."""

from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from reference_np import grad, ops, optim
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.low_precision import rounded_ops
from reference_np.model import Cache, forward
from reference_np.mutants import Mutant
from reference_np.optim import Hyperparameters

IN_FORWARD = ("logits", "decode", "trace", "traced_decode")


class Oracle:
    """reference_np behind the protocol, with any of its operations replaced."""

    dtypes: Sequence[str] = ("float64", "float32")
    example_fraction = 1.0

    def __init__(
        self,
        ops: ModuleType | SimpleNamespace = ops,
        vjps: SimpleNamespace = grad.REFERENCE_VJPS,
        rules: SimpleNamespace = optim.REFERENCE_RULES,
    ) -> None:
        self.ops, self.vjps, self.rules = ops, vjps, rules

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache]:
        given: dict[str, Any] = {"positions": positions, "mask": mask, "cache": cache}
        return forward(params, tokens, config, **given, ops=self.ops)

    def logits(self, *arguments: Any) -> Array:
        return self.decode(*arguments, None)[0]

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Mapping[str, Array], Cache]:
        found: dict[str, Array] = {}
        given: dict[str, Any] = {"positions": positions, "mask": mask, "cache": cache}
        note = found.__setitem__
        _, cache = forward(params, tokens, config, **given, ops=self.ops, trace=note)
        return found, cache

    def trace(self, *arguments: Any) -> Mapping[str, Array]:
        return self.traced_decode(*arguments, None)[0]

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        return self.rules.accumulate(params, batches, config, z_loss, self.vjps)

    def train(
        self,
        config: LlamaConfig,
        params: Params,
        batches: Sequence[Batch],
        hyper: Hyperparameters,
        steps: int,
    ) -> Mapping[str, Any]:
        params = dict(params)
        state, losses, norms = optim.init_state(params), [], []
        for _ in range(steps):
            params, state, metrics = optim.train_step(
                params, state, batches, config, hyper, rules=self.rules, vjps=self.vjps
            )
            losses.append(metrics.loss)
            norms.append(metrics.grad_norm)
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return {"loss": losses, "grad_norm": norms, "params": params, **moments}


class WithBug(Oracle):
    """The oracle with one known bug; it offers only what that bug can reach."""

    dtypes = ("float64",)

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(
            *(mutant.apply(part) for part in (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES))
        )
        in_forward = hasattr(ops, mutant.operation)
        for name in ("loss_and_grads", "train") if in_forward else IN_FORWARD:
            setattr(self, name, None)


class Plain(Oracle):
    """The baseline of a precision: the oracle in float32, or storing less than that."""

    def __init__(self, dtype: str) -> None:
        super().__init__(ops if dtype in ("float32", "float64") else rounded_ops(dtype))

    def decode(self, config: LlamaConfig, params: Params, *rest: Any) -> tuple[Array, Cache]:
        return super().decode(config, _float32(params), *rest)

    def traced_decode(
        self, config: LlamaConfig, params: Params, *rest: Any
    ) -> tuple[Mapping[str, Array], Cache]:
        return super().traced_decode(config, _float32(params), *rest)


def _float32(params: Params) -> Params:
    return {name: value.astype(np.float32) for name, value in params.items()}
