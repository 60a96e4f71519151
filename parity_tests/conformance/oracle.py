"""The oracle as a backend: unchanged, with one known bug, or as the baseline of a precision."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from reference_np import grad, ops, optim
from reference_np.angle_error import inexact_tables
from reference_np.backend import Array, Params
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.low_precision import rounded_ops
from reference_np.model import Cache, forward
from reference_np.mutants import Mutant
from reference_np.optim import Hyperparameters

from .case_parts import rounded_to

FORWARD_METHODS = ("logits", "decode", "trace", "traced_decode")
OTHER_METHODS = ("start", "append", "from_directory")
TRAINING_METHODS = ("loss_and_grads", "train")


class Oracle:
    """reference_np as a backend, with the operations that are given.

    ``ops`` are those of the forward pass, ``vjps`` of the backward pass, ``rules`` of a training
    step; the methods are described in reference_np/backend.py.
    """

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
        inputs: dict[str, Any] = {"positions": positions, "mask": mask, "cache": cache}
        return forward(params, tokens, config, **inputs, ops=self.ops)

    def logits(self, *arguments: Any) -> Array:
        return self.decode(*arguments, None)[0]

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        checkpoint = Checkpoint(path, np.float64)
        params = rounded_to(dtype, dict(checkpoint))
        return lambda tokens: self.logits(checkpoint.config, params, tokens, None, None)

    def directory_logits(
        self, config: LlamaConfig, form: str, path: str, dtype: str, tokens: Array
    ) -> Array:
        """Return the logits of a directory; the first two arguments are for calls.Calls."""
        return self.from_directory(path, dtype)(tokens)

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Mapping[str, Array], Cache]:
        activations: dict[str, Array] = {}
        inputs: dict[str, Any] = {"positions": positions, "mask": mask, "cache": cache}
        trace = activations.__setitem__
        _, cache = forward(params, tokens, config, **inputs, ops=self.ops, trace=trace)
        return activations, cache

    def trace(self, *arguments: Any) -> Mapping[str, Array]:
        return self.traced_decode(*arguments, None)[0]

    def start(self, config: LlamaConfig, params: Params, rows: Sequence[Array]) -> Array:
        self._running = config, params, [None] * len(rows)
        return self._continued([row[None] for row in rows])

    def append(self, tokens: Array) -> Array:
        return self._continued([row[None] for row in tokens])

    def _continued(self, tokens: Sequence[Array]) -> Array:
        """Return the last logits [B, V] of every row [1, T], each continuing its own cache."""
        config, params, caches = self._running
        logits = []
        for i, row in enumerate(tokens):
            found, caches[i] = self.decode(config, params, row, None, None, caches[i])
            logits.append(found[0, -1])
        return np.stack(logits)

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
    """The oracle with one known bug, without the methods that the bug does not change."""

    def __init__(self, mutant: Mutant, dtype: str = "float64") -> None:
        self.dtypes = (dtype,)
        if dtype != "float64":  # examples of wider models, which take longer
            self.example_fraction = 0.1
        super().__init__(
            *(mutant.apply(part) for part in (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES))
        )
        # A bug of the forward pass is tested by the forward methods, one of the training step by
        # the training methods; without the others no test is run in vain.
        in_forward = hasattr(ops, mutant.operation)
        for name in (*OTHER_METHODS, *(TRAINING_METHODS if in_forward else FORWARD_METHODS)):
            setattr(self, name, None)


class Baseline(Oracle):
    """The baseline of a precision: the oracle in float64 or float32, or rounding every result.

    With a ``pattern`` its rotary angles are off by the bound of a float32 product.
    """

    def __init__(self, dtype: str, pattern: int | None = None) -> None:
        operations = dict(vars(ops if dtype in ("float32", "float64") else rounded_ops(dtype)))
        rules = optim.REFERENCE_RULES
        if pattern is not None:
            operations["rope_tables"] = inexact_tables(pattern)
        inexact = SimpleNamespace(**operations)
        if pattern is not None:
            accumulate = partial(optim.accumulate, ops=inexact)
            rules = SimpleNamespace(**vars(rules) | {"accumulate": accumulate})
        super().__init__(inexact, rules=rules)
        self.dtype = dtype

    def decode(self, config: LlamaConfig, params: Params, *rest: Any) -> tuple[Array, Cache]:
        return super().decode(config, self._computed(params), *rest)

    def traced_decode(
        self, config: LlamaConfig, params: Params, *rest: Any
    ) -> tuple[Mapping[str, Array], Cache]:
        return super().traced_decode(config, self._computed(params), *rest)

    def _computed(self, params: Params) -> Params:
        if self.dtype == "float64":
            return params
        return {name: value.astype(np.float32) for name, value in params.items()}
