"""Judge every activation of every call: its errors beside their bounds, in one row."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    Errors,
    composed_bound,
    errors,
    errors_and_bounds,
    kl_bound,
    kl_per_token,
    sequential_sum_error,
)

from .replay import Activations, Key

# The operation that computes an activation, by the last part of its name.
OPERATION = {
    "embed": "the embedding lookup",
    "attn_norm": "RMSNorm before attention",
    "q": "the query projection",
    "k": "the key projection",
    "v": "the value projection",
    "q_rope": "the rotation of the queries (RoPE)",
    "k_rope": "the rotation of the keys (RoPE)",
    "attn": "attention (cache, scores, mask, softmax, mix)",
    "attn_proj": "the output projection of attention",
    "attn_residual": "the residual addition after attention",
    "ffn_norm": "RMSNorm before the feed-forward network",
    "gate": "the gate projection",
    "up": "the up projection",
    "ffn": "SwiGLU",
    "ffn_proj": "the down projection",
    "residual": "the residual addition after the feed-forward network",
    "norm": "the final RMSNorm",
    "logits": "the vocabulary projection",
    "logits.kl": "the predicted distribution",
    "target_logprobs": "the log-probabilities of the targets (log-softmax)",
}
KL = "logits.kl"
REORDERED = "in another order"
DOCUMENTED = "documented"
RIGHT = ("ok", "inherits", DOCUMENTED)  # statuses of an operation that is right by itself


class Measure(NamedTuple):
    """An error and its bound."""

    error: Errors
    bound: Errors
    # The error of a tensor whose every element is at its bound, where each has one of its own.
    all_at_bound: Errors | None = None

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error.within(self.bound)

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        return self.error.share(self.bound)

    @property
    def loosest_bound(self) -> Errors:
        """The bound of an error that may be anywhere in the tensor."""
        return self.all_at_bound or self.bound


class Row(NamedTuple):
    """The errors of one activation of one call, or of one quantity of a training step.

    status: ok; diverges (its operation is wrong); inherits (its operation is right, and its error
    came with its input); documented (within the bound of a difference that the port declares);
    or one that says why nothing was compared: missing, not finite,
    misshapen, in another order (of axes).
    """

    call: int
    name: str
    status: str
    inherited: Measure | None = None
    fresh: Measure | None = None
    detail: str = ""  # of what was not compared: where, or how, it is unfit

    @property
    def kind(self) -> str:
        """The last part of the name."""
        return KL if self.name == KL else self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The layer's index; None outside the layers."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def compared(self) -> bool:
        """Whether the activation was measured."""
        return self.status in (*RIGHT, "diverges")

    @property
    def held(self) -> bool:
        """Whether it is within its bound."""
        return self.status in ("ok", DOCUMENTED)

    @property
    def wrong(self) -> bool:
        """Whether its operation is wrong, or it cannot be compared."""
        return self.status not in RIGHT

    @property
    def operation_error(self) -> Measure | None:
        """The error of its operation alone: the fresh one, or else the inherited one."""
        return self.fresh if self.fresh is not None else self.inherited


class Reference(NamedTuple):
    """The exact value of an activation, with the bound of its error."""

    exact: Array
    bound: Errors
    element_bounds: Array | None = None  # of every element's absolute error, shaped as ``exact``
    rms_bound: float = math.inf  # beside ``element_bounds``, of the error's rms over all elements

    def measure(self, theirs: Array) -> Measure:
        """Measure the other side's activation, by the bound of which its error is a smaller share.

        Attention and the norms have two: one for each element, derived from the inputs, and that
        of the baseline. Where the other side does not show an input, the oracle's stands in for
        it, and the baseline says what the rounding of that input makes of the output.
        """
        by_baseline = Measure(errors(theirs, self.exact), self.bound)
        if self.element_bounds is None:
            return by_baseline
        pair = errors_and_bounds(theirs, self.exact, self.element_bounds)
        bounds = (pair[1], errors(self.exact + self.element_bounds, self.exact))
        limits = (each._replace(rms=min(each.rms, self.rms_bound)) for each in bounds)
        derived = Measure(pair[0], *limits)
        return min(derived, by_baseline, key=lambda measure: measure.share)


def judge(key: Key, theirs: Array | None, references: Sequence[Reference]) -> Row:
    """Return the row of one activation.

    ``references``: the free-running one and, where there is one, the teacher-forced one.
    """
    if theirs is None:
        return Row(*key, "missing")
    if theirs.shape != references[0].exact.shape:
        shapes = f"{list(theirs.shape)}, not {list(references[0].exact.shape)}"
        return Row(*key, "misshapen", detail=f"in its shape, {shapes}")
    bad = ~np.isfinite(theirs)
    if bad.any():
        first = [int(i) for i in np.argwhere(bad)[0]]
        kind = "NaN" if np.isnan(theirs[bad]).any() else "infinite"
        found = f"in {int(bad.sum())} of {bad.size} values, {kind}, the first at {first}"
        return Row(*key, "not finite", detail=found)
    measures = [reference.measure(theirs) for reference in references]
    inherited, fresh = measures[0], measures[-1] if len(measures) > 1 else None
    status = "ok" if inherited.holds else "inherits"
    if not (fresh or inherited).holds:
        status = "diverges"
    return Row(*key, status, inherited, fresh)


def error_bound(exact: Array, baselines: Sequence[Array], dtype: str, n_terms: int = 0) -> Errors:
    """Return the error allowed to an implementation in ``dtype``; see composed_bound.

    ``baselines``: the oracle's own values in that precision. The one that errs most counts; one
    that overflowed is left out. ``n_terms``: the length of the sum in every element, which a port
    may add term by term where the baseline's BLAS adds blocks of them.
    """
    if dtype == "float64":
        return Errors(FLOAT64_TOLERANCE, FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
    measured = (errors(baseline, exact) for baseline in baselines)
    usable = [error for error in measured if all(map(math.isfinite, error))]
    least = sequential_sum_error(n_terms, dtype)
    largest = Errors(*map(max, zip(Errors(least, least, least), *usable, strict=True)))
    return composed_bound(largest, dtype)


def judge_kl(
    c: int,
    theirs: Activations,
    free_running: Activations,
    baselines: Sequence[Activations],
    dtype: str,
) -> Row:
    """Return the row of the KL of a call's worst token, in nats; it has no fresh error."""
    key = (c, "logits")
    exact = free_running[key]
    row = judge(key, theirs.get(key), [Reference(exact, Errors(0, 0, 0))])._replace(name=KL)
    if row.inherited is None:
        return row
    kl, *of_baselines = (float(kl_per_token(x[key], exact).max()) for x in (theirs, *baselines))
    finite = [x for x in of_baselines if x < math.inf]  # NaN is not
    limit = kl_bound(max(finite, default=0.0), float(np.abs(exact).max()), dtype)
    measure = Measure(Errors(kl, kl, kl), Errors(limit, limit, limit))
    return row._replace(status="ok" if measure.holds else "inherits", inherited=measure)
