"""The tolerance of each output of a scenario, and the known bugs with the same output.

In float64 the error is the largest difference over the largest value, and the tolerance
FLOAT64_TOLERANCE. In a lower precision the same scenario runs on a baseline, plain NumPy in that
precision, and its error sets the tolerance (reference_np/tolerances.py, tier 3). For a backend
that declares float32 angles, it runs on the oracle with every angle off by its bound as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from reference_np import grad, ops, optim
from reference_np.angle_error import ANGLE_PATTERNS
from reference_np.backend import Array
from reference_np.mutants import FORWARD, Mutant
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOAT64_TOLERANCE,
    Errors,
    composed_bound,
    errors,
    kl_bound,
    kl_per_token,
    max_relative_error,
)
from reference_np.training_mutants import TRAINING

from .ignored import IGNORED
from .oracle import Baseline, Oracle

Outputs = Mapping[str, Array]
Scenario = Callable[[Any], Outputs]

# An output is a bug's where it is this many times closer to the bug's than to the right one.
RESEMBLING = 100.0


class Share(NamedTuple):
    """The error of one output as shares of its tolerances."""

    name: str
    share: float  # of the tolerance, a declared difference allowed for
    strict: float  # of the tolerance without it
    detail: str  # a line of the error and the tolerance


@dataclass
class Bounds:
    """The tolerances of a scenario's outputs; the baselines run when they are first needed."""

    dtype: str
    run: Scenario
    tolerance: float  # in float64
    rms_only: bool
    float32_angles: bool

    @cached_property
    def baseline(self) -> Outputs:
        """The outputs of the scenario in the same precision, on the oracle."""
        return self.run(Baseline(self.dtype))

    @cached_property
    def angled(self) -> list[Outputs]:
        """The outputs where every rotary angle is off by the bound of a float32 product."""
        patterns = range(ANGLE_PATTERNS) if self.float32_angles else ()
        return [self.run(Baseline(self.dtype, pattern)) for pattern in patterns]

    def shares(self, name: str, actual: Array, exact: Array) -> Iterator[Share]:
        """Yield the shares of one output, and of the divergence of logits in low precision."""
        if self.dtype == "float64":
            error = max_relative_error(actual, exact)
            off = max((max_relative_error(one[name], exact) for one in self.angled), default=0.0)
            limit = self.tolerance + BASELINE_FACTOR * off
            detail = f"error      {error:.3g} of the largest value, tolerance {limit:.3g}"
            yield Share(name, error / limit, error / self.tolerance, detail)
            return
        error = errors(actual, exact)
        baselines = [errors(one[name], exact) for one in (self.baseline, *self.angled)]
        # A baseline that overflowed would excuse any error.
        assert all(map(math.isfinite, baselines[0])), f"{name}: the baseline is not finite"
        widest = Errors(*map(max, zip(*baselines, strict=True)))
        yield self._share(name, error, baselines[0], widest)
        if name == "logits" and not self.rms_only:
            yield self._divergence(actual, exact)

    def _share(self, name: str, error: Errors, plain: Errors, widest: Errors) -> Share:
        strict, bound = (composed_bound(one, self.dtype) for one in (plain, widest))
        kinds = ("rms",) if self.rms_only else Errors._fields
        detail = ", ".join(
            f"{kind} {getattr(error, kind):.3g} (tolerance {getattr(bound, kind):.3g})"
            for kind in kinds
        )
        shares = (
            max(_ratio(getattr(error, kind), getattr(limit, kind)) for kind in kinds)
            for limit in (bound, strict)
        )
        return Share(name, *shares, f"error      {detail}")

    def _divergence(self, actual: Array, exact: Array) -> Share:
        largest = float(np.abs(exact).max())
        kl = float(kl_per_token(actual, exact).max())
        baselines = [
            float(kl_per_token(one["logits"], exact).max()) for one in (self.baseline, *self.angled)
        ]
        strict, limit = (
            kl_bound(one, largest, self.dtype) for one in (baselines[0], max(baselines))
        )
        detail = f"error      KL {kl:.3g} nats (tolerance {limit:.3g})"
        return Share("logits' KL", kl / limit, kl / strict, detail)


def _ratio(error: float, bound: float) -> float:
    return error / bound if error < math.inf else math.inf


def _fixed_epsilon(value: float) -> Mutant:
    """Return the bug of a norm whose epsilon is a constant of the code."""
    return Mutant(
        f"norm_eps_{value:g}",
        f"norm_eps is {value:g} whatever the config says",
        "a key that is not read",
        "rms_norm",
        lambda x, w, eps: ops.rms_norm(x, w, value),
    )


# The two values that most code has. They are no bugs of the catalogue: where the config has the
# same value, they change nothing.
FIXED_EPSILONS = tuple(_fixed_epsilon(value) for value in (1e-5, 1e-6))


def _suspects() -> Iterator[tuple[str, str, Oracle]]:
    """Yield the name, the sentence and the oracle of every bug that a failure may equal."""
    for mutant in (*FORWARD, *FIXED_EPSILONS, *TRAINING):
        parts = (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES)
        yield mutant.name, mutant.sentence, Oracle(*(mutant.apply(part) for part in parts))
    for name, (sentence, oracle) in IGNORED.items():
        yield name, sentence, oracle


def resembling(run: Scenario, name: str, actual: Array, exact: Array, dtype: str) -> list[str]:
    """Return "name: sentence" of the known bugs with this output, the nearest first."""
    if dtype not in ("float64", "float32"):
        return []
    nearest = max_relative_error(actual, exact) / RESEMBLING
    found = {}
    for bug, sentence, oracle in _suspects():
        try:
            with np.errstate(all="ignore"):
                outputs = run(oracle)
        except Exception:  # a bug may fail on its own consequences
            continue
        distance = max_relative_error(actual, outputs[name])
        if distance <= nearest:
            # In float64 what is equal but for rounding keeps the catalogue's order.
            found[f"{bug}: {sentence}"] = max(distance, FLOAT64_TOLERANCE)
    return sorted(found, key=found.__getitem__)
