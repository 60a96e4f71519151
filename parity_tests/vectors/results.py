"""What a case computes in an arithmetic of choice; the bounds of each precision; the bugs it tells.

The measure of an error is ``max |a - e| / max |e|`` over the real tokens of one tensor.
"""

import math
from collections.abc import Mapping
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference_np import grad, ops, optim
from reference_np.angle_error import ANGLE_PATTERNS, inexact_tables
from reference_np.config import LlamaConfig
from reference_np.low_precision import round_to, rounded_ops
from reference_np.model import Cache, forward
from reference_np.mutants import FORWARD, Mutant
from reference_np.ops import IGNORE, Array
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOAT64_TOLERANCE,
    FLOOR_ROUNDINGS_WORST,
    UNIT_ROUNDOFF,
)
from reference_np.training_mutants import TRAINING

from .arithmetic import Arithmetic, decimal_digits, decimals, rounded
from .case_parts import Case
from .models import Model, random_integers
from .reading import real_tokens, relative_error

PRECISIONS = ("float64", "float32", "bfloat16", "float16")
# As the conformance suite's: AdamW divides by sqrt(v) + 1e-5.
STEPS_TOLERANCE = 10 * FLOAT64_TOLERANCE
TOLD_APART = 10.0  # a bug's error is at least so many times a bound
NO_CHANGE = 1e-12  # float64's own rounding
PERTURBED = 2  # baselines with other parameters

Results = dict[str, Array]
Namespace = ModuleType | SimpleNamespace


class Operations(NamedTuple):
    """The operations of the forward pass, of the backward pass and of the optimizer."""

    forward: Namespace = ops
    vjps: Namespace = grad.REFERENCE_VJPS
    rules: Namespace = optim.REFERENCE_RULES


def run(case: Case, config: LlamaConfig, params: Mapping[str, Array], by: Operations) -> Results:
    """Return every activation and every result of the steps by its name in the trace."""
    found: Results = {}
    caches: list[Cache] = []
    for c, call in enumerate(case.calls):
        logits, present = forward(
            params,
            call.tokens,
            config,
            positions=call.positions,
            mask=call.mask,
            cache=None if call.after is None else caches[call.after],
            trace=lambda name, value, c=c: found.__setitem__(f"call.{c}.{name}", value),
            ops=by.forward,
        )
        caches.append(present)
        if call.targets is not None:
            found[f"call.{c}.target_logprobs"] = logprobs(logits, call.targets, by.forward)
    if case.hyperparameters is not None:
        found |= _steps(case, config, dict(params), by)
    return found


def logprobs(logits: Array, targets: Array, by: Namespace) -> Array:
    """Return the log-probability of each target [B, T]; 0 where there is none."""
    at = np.where(targets == IGNORE, 0, targets)[..., None]
    chosen = np.take_along_axis(logits - by.log_sum_exp(logits), at, axis=-1)[..., 0]
    return np.where(targets == IGNORE, chosen[0, 0] * 0, chosen)


def _steps(case: Case, config: LlamaConfig, params: Results, by: Operations) -> Results:
    assert case.hyperparameters is not None
    found: Results = {}
    state = optim.init_state(params)
    for s, step in enumerate(case.steps):
        params, state, metrics = optim.train_step(
            *(params, state, step.batches, config, case.hyperparameters),
            rules=by.rules,
            vjps=by.vjps,
        )
        found[f"step.{s}.loss"] = np.array(metrics.loss)
        found[f"step.{s}.grad_norm"] = np.array(metrics.grad_norm)
        kinds = {"grad": metrics.grads}
        if case.update:
            kinds |= {"param": params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        found |= {f"step.{s}.{k}.{n}": v for k, of in kinds.items() for n, v in of.items()}
    return found


def arithmetic_operations(arithmetic: Arithmetic, dtype: str = "float32") -> Operations:
    """Return all operations of an arithmetic; those of 16 bits have their results rounded."""
    forward_ops = arithmetic.forward_ops()
    if dtype in ("bfloat16", "float16"):
        forward_ops = rounded_ops(dtype, forward_ops)
    return Operations(forward_ops, arithmetic.vjps(), arithmetic.rules(forward_ops))


def expected(case: Case, model: Model) -> Results:
    """Return the results in decimals of 40 digits, each rounded once to float64."""
    with decimal_digits():
        params = {name: decimals(value) for name, value in model.params.items()}
        found = run(case, model.config, params, arithmetic_operations(Arithmetic(decimal=True)))
        return {name: rounded(value) for name, value in found.items()}


def error(case: Case, name: str, actual: Array, exact: Array) -> float:
    """Return ``max |a - e| / max |e|`` over the real tokens; inf for what is not finite."""
    if actual.shape != exact.shape:
        return math.inf
    return relative_error(real_tokens(case.real, name, actual), real_tokens(case.real, name, exact))


@cache
def _signs(count: int, seed: int) -> Array:
    return (2 * random_integers(f"signs/{seed}", count, 2) - 1).astype(np.float32)


def _perturbed(params: Mapping[str, Array], dtype: str, seed: int) -> Results:
    """Return the parameters in a dtype, each moved by a unit in the last place for a seed."""
    unit = np.float32(2 * UNIT_ROUNDOFF[dtype] if seed else 0)
    moved = {n: p * (1 + unit * _signs(p.size, seed).reshape(p.shape)) for n, p in params.items()}
    if dtype == "float32":
        return moved
    return {name: round_to(p, dtype) for name, p in moved.items()}


def bounds(case: Case, model: Model, exact: Results) -> dict[str, list[float | None]]:
    """Return each result's bound in every precision, None where it is not judged.

    In float64 the suite's tolerance. Below, three times the largest error of four baselines plus
    24 roundings: sums forwards, sums backwards, and parameters moved by a unit in the last place.
    Last what is added for a port whose rotary angles are products in float32.
    """
    found: dict[str, list[float | None]] = {}
    for name in exact:
        trained = name.split(".")[2] in ("param", "exp_avg", "exp_avg_sq")
        late = trained or (name.startswith("step.") and not name.startswith("step.0."))
        found[name] = [STEPS_TOLERANCE if late else FLOAT64_TOLERANCE]
    for dtype in PRECISIONS[1:]:
        worst: dict[str, float | None]
        if case.steps and dtype != "float32":
            worst = dict.fromkeys(exact, None)
        else:
            worst = _worst_baseline(case, model, exact, dtype)
        for name, largest in worst.items():
            found[name].append(None if largest is None else _bound(largest, dtype))
    for name, off in _angle_changes(case, model, exact).items():
        found[name].append(_three_digits(BASELINE_FACTOR * off) if off > NO_CHANGE else 0.0)
    return found


def _angle_changes(case: Case, model: Model, exact: Results) -> dict[str, float]:
    """Return how far rotary angles that are products in float32 may change each result."""
    params = {name: value.astype(np.float64) for name, value in model.params.items()}
    plain = run(case, model.config, params, Operations())
    changes = dict.fromkeys(exact, 0.0)
    for pattern in range(ANGLE_PATTERNS):
        by = SimpleNamespace(**vars(ops) | {"rope_tables": inexact_tables(pattern)})
        moved = Operations(by, rules=Arithmetic(decimal=False).rules(by))
        for name, value in run(case, model.config, params, moved).items():
            scale = float(np.abs(real_tokens(case.real, name, exact[name])).max()) or 1.0
            off = np.abs(real_tokens(case.real, name, value - plain[name])).max() / scale
            changes[name] = max(changes[name], float(off))
    return changes


def _worst_baseline(
    case: Case, model: Model, exact: Results, dtype: str
) -> dict[str, float | None]:
    worst: dict[str, float | None] = {}
    for seed, backwards in [(0, False), (0, True), *((s + 1, False) for s in range(PERTURBED))]:
        by = arithmetic_operations(Arithmetic(False, backwards), dtype)
        results = run(case, model.config, _perturbed(model.params, dtype, seed), by)
        for name, value in results.items():
            one = error(case, name, value, exact[name])
            assert math.isfinite(one), f"{case.name}: {name} is not finite in {dtype}"
            worst[name] = max(one, worst.get(name) or 0.0)
    return worst


def _bound(largest: float, dtype: str) -> float:
    """Return the bound of a precision, its digits after the third rounded up."""
    bound = BASELINE_FACTOR * largest + FLOOR_ROUNDINGS_WORST * UNIT_ROUNDOFF[dtype]
    return _three_digits(bound)


def _three_digits(bound: float) -> float:
    """Return a bound with its digits after the third rounded up."""
    unit = 10.0 ** (math.floor(math.log10(bound)) - 2)
    return float(f"{math.ceil(bound / unit * (1 - 1e-9)) * unit:.2e}")


def told_apart(
    case: Case, model: Model, exact: Results, limits: Mapping[str, list[Any]]
) -> tuple[list[str], list[str]]:
    """Return the names of the bugs that the case shows in float32, and in float64 alone.

    A bug is shown where the oracle with it errs by ten bounds or more. It runs in float64, so that
    no rounding adds to it; a bug of rounding, whose size depends on the precision, in both.
    """
    in_float32, in_float64 = [], []
    for mutant in (*FORWARD, *TRAINING):
        by = Operations(*(mutant.apply(part) for part in Operations()))
        shares = _shares(case, model, exact, limits, mutant, by, "float64")
        if shares[0] >= TOLD_APART and mutant.known_by == "size":
            wide = _shares(case, model, exact, limits, mutant, by, "float32")
            shares = shares[0], max(shares[1], wide[1])
        if shares[1] >= TOLD_APART:
            in_float32.append(mutant.name)
        elif shares[0] >= TOLD_APART:
            in_float64.append(mutant.name)
    return in_float32, in_float64


def _shares(
    case: Case,
    model: Model,
    exact: Results,
    limits: Mapping[str, list[Any]],
    mutant: Mutant,
    by: Operations,
    dtype: str,
) -> tuple[float, float]:
    """Return a bug's largest error in float64's and in float32's bounds."""
    params = {name: value.astype(dtype) for name, value in model.params.items()}
    try:
        with np.errstate(all="ignore"):
            results = run(case, model.config, params, by)
    except (ValueError, IndexError):  # its own consequence: a port would fail here too
        return math.inf, math.inf
    errors = {name: error(case, name, value, exact[name]) for name, value in results.items()}
    worst = [max(e / limits[name][i] for name, e in errors.items()) for i in (0, 1)]
    return worst[0], worst[1]
