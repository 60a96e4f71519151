"""Errors beside their bounds: one row for every activation of every call."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import (
    LOGIC,
    Errors,
    composed_bound,
    errors,
    errors_beside,
    kl_bound,
    kl_per_token,
    one_by_one,
)

from .replay import Activations, Key

# What each activation is the result of, given the traced ones before it.
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
}
KL = "logits.kl"
REORDERED = "in another order"
RIGHT = ("ok", "inherits")  # statuses of an operation that is right by itself


class Measure(NamedTuple):
    """An error and its bound."""

    error: Errors
    bound: Errors
    widest: Errors | None = None  # bound, where every element has its own

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error.within(self.bound)

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        return self.error.share(self.bound)

    @property
    def loosest(self) -> Errors:
        """The bound wherever in the tensor the error is, for what is no error of one element."""
        return self.widest or self.bound


class Row(NamedTuple):
    """One activation of one call.

    status: ok; diverges (this operation is wrong); inherits (it is right and its input was
    not); or missing, not finite, misshapen, in another order of axes: not compared at all.
    """

    call: int
    name: str
    status: str
    inherited: Measure | None = None
    fresh: Measure | None = None

    @property
    def kind(self) -> str:
        """The last part of the name."""
        return KL if self.name == KL else self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The layer's index; None for what belongs to none."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def compared(self) -> bool:
        """Whether numbers were compared at all."""
        return self.status in ("ok", "diverges", "inherits")

    @property
    def wrong(self) -> bool:
        """Whether it is wrong by itself, or cannot be compared."""
        return self.status not in RIGHT

    @property
    def own(self) -> Measure | None:
        """The measure that tells of this operation alone, as far as it is known."""
        return self.fresh if self.fresh is not None else self.inherited


class Judged(NamedTuple):
    """What an activation is held to: values, and the bound of all or of every element."""

    exact: Array
    bound: Errors
    allowed: Array | None = None

    def measure(self, theirs: Array) -> Measure:
        """Measure the other side's activation; of two bounds the nearer to hold counts.

        Where an input of attention is missing, the oracle's own stands in for it, and a plain
        run tells what that one's rounding makes of the output.
        """
        plain = Measure(errors(theirs, self.exact), self.bound)
        if self.allowed is None:
            return plain
        widest = errors(self.exact + self.allowed, self.exact)
        derived = Measure(*errors_beside(theirs, self.exact, self.allowed), widest)
        return min(derived, plain, key=lambda measure: measure.share)


def judge(key: Key, theirs: Array | None, held: Sequence[Judged]) -> Row:
    """Measure one activation against the free run and, if there is a second, the forced."""
    if theirs is None:
        return Row(*key, "missing")
    if theirs.shape != held[0].exact.shape:
        return Row(*key, "misshapen")
    if not np.isfinite(theirs).all():
        return Row(*key, "not finite")
    measures = [judged.measure(theirs) for judged in held]
    inherited, fresh = measures[0], measures[-1] if len(measures) > 1 else None
    status = "ok" if inherited.holds else "inherits"
    if not (fresh or inherited).holds:
        status = "diverges"
    return Row(*key, status, inherited, fresh)


def bound(exact: Array, low: Sequence[Array], dtype: str, n_terms: int = 0) -> Errors:
    """Return the error allowed to an implementation in ``dtype``; see composed_bound.

    Of several plain runs the one that errs most counts. One that overflowed excuses nothing.
    A sum of ``n_terms`` may be taken term by term, which no plain run does.
    """
    if dtype == "float64":
        return Errors(LOGIC, LOGIC, LOGIC)
    tries = [error for error in (errors(x, exact) for x in low) if all(map(math.isfinite, error))]
    least = one_by_one(n_terms, dtype)
    baseline = Errors(*map(max, zip(Errors(least, least, least), *tries, strict=True)))
    return composed_bound(baseline, dtype)


def judge_kl(
    c: int, theirs: Activations, free: Activations, low: Sequence[Activations], dtype: str
) -> Row:
    """Judge the KL of the worst token, in nats; it is inherited by nature."""
    key = (c, "logits")
    row = judge(key, theirs.get(key), [Judged(free[key], Errors(0, 0, 0))])._replace(name=KL)
    if row.inherited is None:
        return row
    kl, *honest = (float(kl_per_token(x[key], free[key]).max()) for x in (theirs, *low))
    finite = [x for x in honest if x < math.inf]  # NaN is not
    limit = kl_bound(max(finite, default=0.0), float(np.abs(free[key]).max()), dtype)
    measure = Measure(Errors(kl, kl, kl), Errors(limit, limit, limit))
    return row._replace(status="ok" if measure.holds else "inherits", inherited=measure)
