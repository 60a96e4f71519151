"""The model's operations with every sum in a fixed order, in decimal or float32 numbers.

BLAS libraries, vectorised exponentials and the sums of NumPy differ in their last bits between
processors. Here an array's elements are either Python's ``Decimal`` of 40 digits, whose operations
are exactly rounded by software, or float32, whose additions and products IEEE 754 rounds alike on
every processor; matrix products are loops over the inner axis.

Axes: B batch, T query position, S key position, H query heads, N key/value heads, R query heads
of one of them, K head_dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal, localcontext
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from reference_np import grad, ops, optim
from reference_np.config import LlamaConfig
from reference_np.ops import IGNORE, Array
from reference_np.optim import Hyperparameters

DIGITS = 40
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")

_decimals: Callable[[Any], Any] = np.frompyfunc(Decimal, 1, 1)
_logarithms: Callable[[Any], Any] = np.frompyfunc(Decimal.ln, 1, 1)


def decimals(x: Array) -> Array:
    """Return floats or integers as an array of decimals, each exact."""
    numbers: Array = np.asarray(_decimals(x.astype(object)), dtype=object)
    return numbers


def rounded(x: Array) -> Array:
    """Return decimals as the nearest float64."""
    return np.asarray(x, dtype=object).astype(np.float64)


@contextmanager
def decimal_digits() -> Iterator[None]:
    """Compute with decimals of 40 digits."""
    with localcontext(prec=DIGITS):
        yield


def cos_sin(angle: Decimal) -> tuple[Decimal, Decimal]:
    """Return cosine and sine of an angle by their series, to 40 digits."""
    with localcontext(prec=DIGITS + 20):
        angle = angle.remainder_near(2 * PI)
        term, sums, n = Decimal(1), [Decimal(1), Decimal(0)], 0
        while abs(term) > Decimal(10) ** -(DIGITS + 10) or n < 8:
            n += 1
            term = term * angle / n
            sums[n % 2] += -term if n % 4 in (2, 3) else term
    return sums[0], sums[1]


def rope_frequencies(config: LlamaConfig) -> list[Decimal]:
    """Return the rotary frequencies [K / 2], as ops.rope_frequencies defines them."""
    theta, factor = Decimal(config.rope_theta), Decimal(config.rope_factor)
    low, high = Decimal(config.rope_low_freq_factor), Decimal(config.rope_high_freq_factor)
    half = config.head_dim // 2
    found = []
    with localcontext(prec=DIGITS + 20):
        for i in range(half):
            frequency = (-theta.ln() * i / half).exp()
            kept = Decimal(1)
            if config.rope_type == "llama3":
                turns = config.rope_original_max_seq_len * frequency / (2 * PI)
                kept = min(max((turns - low) / (high - low), Decimal(0)), Decimal(1))
            elif config.rope_type == "linear":
                kept = Decimal(0)
            found.append(frequency * (kept + (1 - kept) / factor))
    return found


@cache
def rotation(position: int, config: LlamaConfig) -> tuple[list[Decimal], list[Decimal]]:
    """Return cosines and sines [K / 2] of one position."""
    with localcontext(prec=DIGITS + 20):
        pairs = [cos_sin(position * frequency) for frequency in rope_frequencies(config)]
    return [cos for cos, _ in pairs], [sin for _, sin in pairs]


class Arithmetic:
    """The operations of ``forward`` and ``backward`` in decimals or, without them, in float32.

    ``backwards`` adds every sum from its last term to its first.
    """

    def __init__(self, decimal: bool, backwards: bool = False) -> None:
        self.decimal = decimal
        self.backwards = backwards
        self.number: Callable[[Any], Any] = Decimal if decimal else np.float32

    def forward_ops(self) -> SimpleNamespace:
        """Return the operations of ``forward``."""
        return SimpleNamespace(**vars(ops) | self._named(FORWARD_NAMES))

    def vjps(self) -> SimpleNamespace:
        """Return the operations of ``backward``."""
        return SimpleNamespace(**vars(grad.REFERENCE_VJPS) | self._named(BACKWARD_NAMES))

    def rules(self, forward_ops: SimpleNamespace | None = None) -> SimpleNamespace:
        """Return the rules of ``train_step``."""
        forward_ops = forward_ops or self.forward_ops()

        def accumulate(params: Any, batches: Any, config: Any, z_loss: Any, vjps: Any) -> Any:
            # backward recomputes the attention weights with the module's own operations.
            with patch.object(grad, "ops", forward_ops):
                return optim.accumulate(params, batches, config, z_loss, vjps, forward_ops)

        own = {"clip": clip, "adamw": adamw} if self.decimal else {}
        return SimpleNamespace(**vars(optim.REFERENCE_RULES) | {"accumulate": accumulate, **own})

    def _named(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    # Elementary functions.

    def exp(self, x: Array) -> Array:
        # float64's last bit differs between libraries and vanishes in float32.
        return np.exp(x) if self.decimal else np.exp(x.astype(np.float64)).astype(np.float32)

    def log(self, x: Array) -> Array:
        if self.decimal:
            return np.asarray(_logarithms(x), dtype=object)
        return np.log(x.astype(np.float64)).astype(np.float32)

    def total(self, x: Array) -> Array:
        """Return the sum over the last axis, which stays with length 1."""
        columns = [x[..., i : i + 1] for i in range(x.shape[-1])]
        first, *rest = columns[::-1] if self.backwards else columns
        for column in rest:
            first = first + column
        return first

    def product(self, a: Array, b: Array) -> Array:
        """Return the matrix product [..., M, I], [..., I, N] -> [..., M, N]."""
        terms = [a[..., :, i, None] * b[..., i, None, :] for i in range(a.shape[-1])]
        first, *rest = terms[::-1] if self.backwards else terms
        for term in rest:
            first = first + term
        return first

    # The forward pass.

    def linear(self, x: Array, weight: Array) -> Array:
        y = self.product(x.reshape(-1, x.shape[-1]), weight.T)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def root_mean_square(self, x: Array, eps: float) -> Array:
        mean: Array = self.total(x * x) / self.number(x.shape[-1])
        root: Array = np.sqrt(mean + self.number(eps))
        return root

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return x / self.root_mean_square(x, eps) * weight

    def rope_tables(self, positions: Array, config: LlamaConfig, dtype: Any) -> Any:
        rows = [[rotation(int(p), config) for p in row] for row in positions]
        tables = np.array([[[pair[i] for pair in row] for row in rows] for i in (0, 1)], object)
        return tuple(tables if self.decimal else tables.astype(np.float64).astype(np.float32))

    def scale(self, width: int) -> Any:
        return self.number(1) / np.sqrt(self.number(width))

    def attention_scores(self, q: Array, k: Array) -> Array:
        return self.product(q * self.scale(q.shape[-1]), k.swapaxes(-1, -2)[:, :, None])

    def masked_softmax(self, scores: Array, mask: Array) -> Array:
        zero, allowed = self.number(0), np.broadcast_to(mask[:, None, None], scores.shape)
        top = np.where(allowed, scores, self.number(-1e30)).max(axis=-1, keepdims=True)
        weights = np.where(allowed, self.exp(np.where(allowed, scores - top, zero)), zero)
        total = self.total(weights)
        return weights / np.where(total == 0, self.number(1), total)

    def attention_mix(self, weights: Array, v: Array) -> Array:
        return self.product(weights, v[:, :, None])

    def sigmoid(self, x: Array) -> Array:
        decay, one = self.exp(-np.abs(x)), self.number(1)
        return np.where(x >= 0, one, decay) / (one + decay)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return gate * self.sigmoid(gate) * up

    def log_sum_exp(self, logits: Array) -> Array:
        top = logits.max(axis=-1, keepdims=True)
        return top + self.log(self.total(self.exp(logits - top)))

    def cross_entropy_sum(self, logits: Array, targets: Array, z_loss: float = 0.0) -> Any:
        valid = targets != IGNORE
        log_z = self.log_sum_exp(logits)[..., 0][valid]
        z = self.number(z_loss)
        return self.total(log_z - logits[valid, targets[valid]] + z * log_z * log_z)[0]

    # The backward pass.

    def linear_vjp(self, x: Array, weight: Array, d: Array) -> tuple[Array, Array]:
        flat_x, flat_d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])
        return self.product(flat_d, weight).reshape(x.shape), self.product(flat_d.T, flat_x)

    def rms_norm_vjp(self, x: Array, weight: Array, eps: float, d: Array) -> tuple[Array, Array]:
        root = self.root_mean_square(x, eps)
        n, g = x / root, d * weight
        d_x = (g - n * self.total(g * n) / self.number(x.shape[-1])) / root
        return d_x, self.total((d * n).reshape(-1, x.shape[-1]).T)[:, 0]

    def attention_scores_vjp(self, q: Array, k: Array, d: Array) -> tuple[Array, Array]:
        d = d * self.scale(q.shape[-1])
        return self.product(d, k[:, :, None]), self._over_readers(d, q)

    def _over_readers(self, a: Array, b: Array) -> Array:
        """Return the sum of a^T b [B, N, S, K] over R and T, a [..., T, S] and b [..., T, K]."""
        a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
        return self.product(a.swapaxes(-1, -2), b)

    def masked_softmax_vjp(self, weights: Array, d: Array) -> Array:
        return weights * (d - self.total(d * weights))

    def attention_mix_vjp(self, weights: Array, v: Array, d: Array) -> tuple[Array, Array]:
        return self.product(d, v.swapaxes(-1, -2)[:, :, None]), self._over_readers(weights, d)

    def swiglu_vjp(self, gate: Array, up: Array, d: Array) -> tuple[Array, Array]:
        s = self.sigmoid(gate)
        return d * up * (s + gate * s * (self.number(1) - s)), d * gate * s

    def cross_entropy_vjp(
        self, logits: Array, targets: Array, n: int, z_loss: float = 0.0
    ) -> Array:
        log_z, one = self.log_sum_exp(logits), self.number(1)
        d = self.exp(logits - log_z) * (one + self.number(2) * self.number(z_loss) * log_z)
        valid = targets != IGNORE
        rows, columns = np.nonzero(valid)
        d[rows, columns, targets[valid]] -= one
        return np.where(valid[..., None], d, self.number(0)) / self.number(n)


FORWARD_NAMES = (
    *("linear", "rms_norm", "rope_tables", "attention_scores", "masked_softmax", "attention_mix"),
    *("sigmoid", "swiglu", "log_sum_exp", "cross_entropy_sum"),
)
BACKWARD_NAMES = (
    *("linear_vjp", "rms_norm_vjp", "attention_scores_vjp", "masked_softmax_vjp"),
    *("attention_mix_vjp", "swiglu_vjp", "cross_entropy_vjp"),
)


def clip(grads: Mapping[str, Array], max_norm: float) -> tuple[dict[str, Array], float]:
    """Return decimal gradients times ``min(1, max_norm / (|g| + 1e-6))``, and |g|."""
    norm = sum((x * x for g in grads.values() for x in g.flat), Decimal(0)).sqrt()
    factor = min(Decimal(1), Decimal(max_norm) / (norm + Decimal(optim.CLIP_EPS)))
    return {name: g * factor for name, g in grads.items()}, float(norm)


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    """Return decimal parameters and moments after one step, as optim.adamw defines them."""
    b1, b2, eps = map(Decimal, (hyper.beta1, hyper.beta2, hyper.adam_eps))
    rate = Decimal(lr)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g * g)
    m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
    return p * (1 - rate * Decimal(decay)) - rate * m_hat / (np.sqrt(v_hat) + eps), m, v
