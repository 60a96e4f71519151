"""Drawn answers, laid out in a batch in any way, and every masked operation run on them."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from reference_np import divergence, masked, policy, reward, sft
from reference_np.ops import IGNORE, Array

from ..conformance.architectures import seeds
from ..conformance.drawn import Draw, composite
from .fine_tuning import VOCAB

MODULES = (sft, masked, reward, divergence, policy)
# Every operation of the fine-tuning oracle; with some replaced, a trainer with a bug.
REFERENCE = SimpleNamespace(**{name: f for module in MODULES for name, f in vars(module).items()})
FILLERS = (np.nan, np.inf, -np.inf, 1e300, 7.0)
LAYOUTS = ("left", "right", "holes")


class Answers(NamedTuple):
    """Answers of B rows: values by name, each row's own [S, ...], and where they stand."""

    rows: list[dict[str, Array]]
    mask: Array  # bool [B, T], as many True in a row as its answer has tokens

    def batch(self, filler: float) -> "Batch":
        """Return all rows in one batch, with ``filler`` where the mask is False."""
        arrays = {}
        for name, first in self.rows[0].items():
            own = filler if first.dtype.kind == "f" else IGNORE
            out = np.full((*self.mask.shape, *first.shape[1:]), own, first.dtype)
            out[self.mask] = np.concatenate([row[name] for row in self.rows])
            arrays[name] = out
        return Batch(arrays, self.mask, self.scores)

    def alone(self) -> list["Batch"]:
        """Return each row as a batch [1, S] of its own, without a masked slot."""
        return [
            Batch(
                {name: value[None] for name, value in row.items()},
                np.ones((1, len(row["values"])), bool),
                self.scores[i : i + 1],
            )
            for i, row in enumerate(self.rows)
        ]

    @property
    def scores(self) -> Array:
        """One score [B] for each answer."""
        return np.linspace(-1.5, 2.0, len(self.rows))


class Batch(NamedTuple):
    """Arrays [B, T, ...] by name, the mask [B, T] and the scores [B]."""

    arrays: Mapping[str, Array]
    mask: Array
    scores: Array

    def __getattr__(self, name: str) -> Array:
        return self.arrays[name]


def answers_of(lengths: list[int], layout: str, seed: int, spare: int = 2) -> Answers:
    """Return random answers of the lengths in rows of the longest one's and ``spare`` slots."""
    rng = np.random.default_rng(seed)
    width = max(lengths) + spare
    mask = np.zeros((len(lengths), width), bool)
    for row, length in zip(mask, lengths, strict=True):
        places = {
            "left": np.arange(width - length, width),
            "right": np.arange(length),
            "holes": rng.choice(width, length, replace=False),
        }
        row[places[layout]] = True
    return Answers([one_answer(rng, length) for length in lengths], mask)


def one_answer(rng: np.random.Generator, length: int) -> dict[str, Array]:
    """Return the values of an answer's tokens by name, each [S] or [S, V]."""
    log_p = -rng.exponential(size=length)
    names = ("advantages", "rewards", "values", "returns", "d_out")
    numbers = {name: rng.standard_normal(length) for name in names}
    return numbers | {
        "logits": 2 * rng.standard_normal((length, VOCAB)),
        "ref_logits": 2 * rng.standard_normal((length, VOCAB)),
        "targets": rng.integers(0, VOCAB, length),
        "log_p": log_p,
        "log_ref": log_p + 0.5 * rng.standard_normal(length),
        "log_old": log_p + 0.3 * rng.standard_normal(length),
        "old_values": numbers["values"] + 0.3 * rng.standard_normal(length),
    }


@composite
def answers(draw: Draw, least: int = 1) -> Answers:
    """Draw answers of some lengths, in any layout."""
    lengths = draw(st.lists(st.integers(least, 5), min_size=1, max_size=4))
    return answers_of(
        lengths,
        draw(st.sampled_from(LAYOUTS)),
        draw(seeds),
        draw(st.integers(int(not any(lengths)), 3)),
    )


Case = Callable[[Any, Batch, int], Array | float | tuple[Array, ...]]
VALUE_CLIP = 0.2


def _policy(o: Any, x: Batch, n: int, function: str, mean: str) -> Any:
    return getattr(o, function)(x.log_p, x.log_old, x.advantages, x.mask, n, mean=mean)


def _value(o: Any, x: Batch, n: int, function: str, clip: float | None) -> Any:
    old = None if clip is None else x.old_values
    return getattr(o, function)(x.values, x.returns, x.mask, n, old_values_BT=old, clip=clip)


# Operation (with a named option) -> its outputs of a batch, given the whole step's count: [B, T,
# ...] for tokens, [B] for rows, numbers for losses, which add up.
CASES: Mapping[str, Case] = {
    "token_loss": lambda o, x, n: o.token_loss(x.logits, x.targets, n),
    "token_loss_vjp": lambda o, x, n: o.token_loss_vjp(x.logits, x.targets, n),
    "score_at": lambda o, x, n: o.score_at(x.values, x.mask),
    "score_at_vjp": lambda o, x, n: o.score_at_vjp(x.mask, x.scores),
    "log_probs": lambda o, x, n: o.log_probs(x.logits, x.targets, 0.7),
    "log_probs_vjp": lambda o, x, n: o.log_probs_vjp(x.logits, x.targets, x.d_out, 0.7),
    "k1": lambda o, x, n: o.k1(x.log_p, x.log_ref, x.mask),
    "k2": lambda o, x, n: o.k2(x.log_p, x.log_ref, x.mask),
    "k3": lambda o, x, n: o.k3(x.log_p, x.log_ref, x.mask),
    "k1_vjp": lambda o, x, n: o.k1_vjp(x.log_p, x.log_ref, x.mask, x.d_out),
    "k2_vjp": lambda o, x, n: o.k2_vjp(x.log_p, x.log_ref, x.mask, x.d_out),
    "k3_vjp": lambda o, x, n: o.k3_vjp(x.log_p, x.log_ref, x.mask, x.d_out),
    "exact_kl": lambda o, x, n: o.exact_kl(x.logits, x.ref_logits, x.mask),
    "exact_kl_vjp": lambda o, x, n: o.exact_kl_vjp(x.logits, x.ref_logits, x.mask, x.d_out),
    "entropy": lambda o, x, n: o.entropy(x.logits, x.mask),
    "entropy_vjp": lambda o, x, n: o.entropy_vjp(x.logits, x.mask, x.d_out),
    "kl_rewards": lambda o, x, n: o.kl_rewards(x.scores, x.log_p, x.log_ref, x.mask, 0.1),
    "gae": lambda o, x, n: o.gae(x.rewards, x.values, x.mask, 0.9, 0.8),
    "policy_loss": lambda o, x, n: _policy(o, x, n, "policy_loss", "token"),
    "policy_loss_vjp": lambda o, x, n: _policy(o, x, n, "policy_loss_vjp", "token"),
    "policy_loss sequence": lambda o, x, n: _policy(o, x, n, "policy_loss", "sequence"),
    "policy_loss_vjp sequence": lambda o, x, n: _policy(o, x, n, "policy_loss_vjp", "sequence"),
    "value_loss": lambda o, x, n: _value(o, x, n, "value_loss", None),
    "value_loss_vjp": lambda o, x, n: _value(o, x, n, "value_loss_vjp", None),
    "value_loss clip": lambda o, x, n: _value(o, x, n, "value_loss", VALUE_CLIP),
    "value_loss_vjp clip": lambda o, x, n: _value(o, x, n, "value_loss_vjp", VALUE_CLIP),
    "loss_count": lambda o, x, n: float(o.loss_count(x.mask, "sequence")),
}


def as_tuple(outputs: Any) -> tuple[Array, ...]:
    """Return an operation's outputs as a tuple of arrays."""
    return tuple(map(np.asarray, outputs if isinstance(outputs, tuple) else (outputs,)))
