"""Each vector-Jacobian product by itself, against central differences of its operation.

With phi(t) = <d_out, f(x + t v)> for a random direction v, <vjp(d_out), v> is phi'(0), and
D(h) = (phi(h) - phi(-h)) / 2h = phi' + a h^2 + b h^4 + ..., so that |D(2h) - D(h)| = 3 |a| h^2
bounds the truncation error of D(h); b h^4 is less than the rounding error of phi.
"""

from collections.abc import Callable
from inspect import getmembers, isfunction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import grad, ops
from reference_np.config import LlamaConfig
from reference_np.mutants import Mutant
from reference_np.ops import IGNORE
from reference_np.tolerances import UNIT_ROUNDOFF
from reference_np.training_mutants import TRAINING

from ..conformance.architectures import seeds
from ..conformance.strategies import Array

pytestmark = pytest.mark.numeric

STEP = 1e-4  # h
VOCAB = 7
# A planted error must be this many times the bound, and so must one of this share of a gradient.
MARGIN = 10.0
SMALL_SHARE = 1e-4


class Sizes(NamedTuple):
    """The axis lengths of the arrays that an operation is tested with."""

    batch: int
    length: int
    groups: int
    repeats: int
    half: int
    dim: int


FULL = Sizes(batch=3, length=4, groups=2, repeats=3, half=3, dim=5)

sizes = st.builds(Sizes, *(st.integers(1, most) for most in (4, 4, 4, 4, 3, 6)))


class Case(NamedTuple):
    """An operation, its differentiable inputs, and its vector-Jacobian product."""

    forward: Callable[..., Array]
    inputs: list[Array]
    vjp: Callable[[Array], Array | tuple[Array, ...]]


def embed(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    tokens = rng.integers(0, VOCAB, (n.batch, n.length))
    weight = rng.standard_normal((VOCAB, n.dim))
    return Case(lambda w: ops.embed(w, tokens), [weight], lambda d: vjp(weight, tokens, d))


def linear(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    x, w = rng.standard_normal((n.batch, n.length, n.dim)), rng.standard_normal((VOCAB, n.dim))
    return Case(ops.linear, [x, w], lambda d: vjp(x, w, d))


def rms_norm(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    x, w = rng.standard_normal((n.batch, n.length, n.dim)), rng.standard_normal(n.dim)
    eps = rng.choice([1e-2, 0.3])
    return Case(lambda x, w: ops.rms_norm(x, w, eps), [x, w], lambda d: vjp(x, w, eps, d))


def apply_rope(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    heads = LlamaConfig(n.dim, 1, 1, 1, 2 * n.half, 8, 8)
    positions = rng.integers(0, 99, (n.batch, n.length))
    tables = ops.rope_tables(positions, heads, np.float64)
    x = rng.standard_normal((n.batch, n.length, n.groups, 2 * n.half))
    return Case(lambda x: ops.apply_rope(x, *tables), [x], lambda d: vjp(*tables, d))


def attention_scores(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    q = rng.standard_normal((n.batch, n.groups, n.repeats, n.length, 2 * n.half))
    k = rng.standard_normal((n.batch, n.groups, n.length + 1, 2 * n.half))
    return Case(ops.attention_scores, [q, k], lambda d: vjp(q, k, d))


def masked_softmax(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    scores = rng.standard_normal((n.batch, n.groups, n.repeats, n.length, n.length + 1))
    mask = rng.random((n.batch, n.length, n.length + 1)) < 0.6
    weights = ops.masked_softmax(scores, mask)
    return Case(lambda s: ops.masked_softmax(s, mask), [scores], lambda d: vjp(weights, d))


def attention_mix(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    weights = rng.random((n.batch, n.groups, n.repeats, n.length, n.length + 1))
    v = rng.standard_normal((n.batch, n.groups, n.length + 1, 2 * n.half))
    return Case(ops.attention_mix, [weights, v], lambda d: vjp(weights, v, d))


def silu(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    x = rng.standard_normal((n.batch, n.length, n.dim))
    return Case(ops.silu, [x], lambda d: vjp(x, d))


def swiglu(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    gate, up = rng.standard_normal((2, n.batch, n.length, n.dim))
    return Case(ops.swiglu, [gate, up], lambda d: vjp(gate, up, d))


def cross_entropy(rng: np.random.Generator, n: Sizes, vjp: Callable[..., Any]) -> Case:
    """Return the summed loss over a count of tokens other than the batch's."""
    logits = rng.standard_normal((n.batch, n.length, VOCAB))
    targets = rng.integers(0, VOCAB, (n.batch, n.length))
    targets[rng.random(targets.shape) < 0.3] = IGNORE
    count, z_loss = n.batch * n.length + 1, 0.1

    def loss(logits: Array) -> Array:
        return np.asarray(ops.cross_entropy_sum(logits, targets, z_loss) / count)

    return Case(loss, [logits], lambda d: d * vjp(logits, targets, count, z_loss))


CASES: dict[str, Callable[[np.random.Generator, Sizes, Callable[..., Any]], Case]] = {
    "embed_vjp": embed,
    "linear_vjp": linear,
    "rms_norm_vjp": rms_norm,
    "apply_rope_vjp": apply_rope,
    "attention_scores_vjp": attention_scores,
    "masked_softmax_vjp": masked_softmax,
    "attention_mix_vjp": attention_mix,
    "silu_vjp": silu,
    "swiglu_vjp": swiglu,
    "cross_entropy_vjp": cross_entropy,
}


def products(module: ModuleType) -> set[str]:
    """Return the names of a module's vector-Jacobian products."""
    return {name for name, _ in getmembers(module, isfunction) if name.endswith("_vjp")}


class Difference(NamedTuple):
    """The error of <d_x, v> against phi' for one input, and its bound."""

    error: float
    bound: float


def differences(case: Case, rng: np.random.Generator) -> list[Difference]:
    """Compare the gradient of every input along a random direction of its own."""
    d_out = rng.standard_normal(np.shape(case.forward(*case.inputs)))
    found = case.vjp(d_out)
    gradients = found if isinstance(found, tuple) else (found,)
    roundoff = rounding(case.inputs, d_out)
    result = []
    for i, (x, d_x) in enumerate(zip(case.inputs, gradients, strict=True)):
        assert d_x.shape == x.shape, f"input {i}"
        direction = rng.standard_normal(x.shape)

        def phi(t: float, i: int = i, v: Array = direction) -> float:
            moved = [y + t * v if j == i else y for j, y in enumerate(case.inputs)]
            return float(np.sum(case.forward(*moved) * d_out))

        near, far = ((phi(h) - phi(-h)) / (2 * h) for h in (STEP, 2 * STEP))
        analytic = float(np.sum(d_x * direction))
        result.append(Difference(abs(near - analytic), abs(far - near) + roundoff / STEP))
    return result


def rounding(inputs: list[Array], d_out: Array) -> float:
    """Return a bound of the rounding error of phi.

    Every output is a sum of at most as many terms as the longest axis has, each no larger than
    two inputs' product (or, for a loss, than the square of a logit), and is rounded once for each
    term and a few times more; phi is their sum, rounded once for each output.
    """
    terms = max(max(x.shape) for x in inputs)
    largest = 1.0 + max(float(np.max(np.abs(x))) for x in inputs)
    roundings = terms + 8 + d_out.size
    total = float(np.sum(np.abs(d_out)))
    return roundings * UNIT_ROUNDOFF["float64"] * terms * largest**2 * total


def test_every_vjp_has_a_case() -> None:
    assert products(grad) == CASES.keys()
    assert vars(grad.REFERENCE_VJPS).keys() <= CASES.keys()


def test_a_vjp_without_a_case_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad, "softplus_vjp", grad.silu_vjp, raising=False)
    assert products(grad) - CASES.keys() == {"softplus_vjp"}


@pytest.mark.parametrize("name", CASES)
@given(n=sizes, seed=seeds)
def test_every_vjp_against_central_differences(name: str, n: Sizes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for i, found in enumerate(differences(CASES[name](rng, n, getattr(grad, name)), rng)):
        assert found.error <= found.bound, f"input {i}: {found}"


def worst(name: str, vjp: Callable[..., Any]) -> float:
    """Return the largest error of a product over ten draws, as a multiple of its bound."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        found += differences(CASES[name](rng, FULL, vjp), rng)
    return max(one.error / one.bound for one in found)


MUTANTS = [mutant for mutant in TRAINING if mutant.operation in CASES]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_of_a_vjp_is_seen(mutant: Mutant) -> None:
    assert worst(mutant.operation, getattr(grad, mutant.operation)) <= 1
    assert worst(mutant.operation, mutant.replacement) >= MARGIN


@pytest.mark.parametrize(
    ("name", "i"),
    [
        (name, i)
        for name, case in CASES.items()
        for i in range(len(case(np.random.default_rng(0), FULL, getattr(grad, name)).inputs))
    ],
)
def test_a_gradient_that_is_slightly_off_is_seen(name: str, i: int) -> None:
    """Of one input, by a ten-thousandth; so no bound is so wide that nothing would exceed it."""

    def off(*given: Any) -> Any:
        found = getattr(grad, name)(*given)
        if not isinstance(found, tuple):
            return found * (1 + SMALL_SHARE)
        return tuple(d * (1 + SMALL_SHARE) if j == i else d for j, d in enumerate(found))

    assert worst(name, off) >= MARGIN
