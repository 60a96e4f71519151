"""What the cases of the golden vectors are made of: tokens, masks, positions, chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_parity.comparison.trace_format import Call, Step
from reference_np.config import LlamaConfig
from reference_np.ops import Array
from reference_np.optim import Hyperparameters

from .models import all_models, random_integers
from .reading import Ranges


@dataclass(frozen=True)
class Case:
    """Some calls of a model, or training steps, and a sentence about them."""

    name: str
    model: str
    about: str
    calls: tuple[Call, ...] = ()
    steps: tuple[Step, ...] = ()
    hyperparameters: Hyperparameters | None = None
    update: bool = False  # whether the steps' updates are stored
    real: tuple[Ranges | None, ...] = ()  # of each call; None where every token is real
    basic: bool = False

    @property
    def kind(self) -> str:
        """Return "training", "decode" or "forward"."""
        return "training" if self.steps else "decode" if len(self.calls) > 1 else "forward"


CONFIGS = {name: model.config for name, model in all_models().items()}


def tokens_of(name: str, config: LlamaConfig, *shape: int) -> Array:
    """Return random token ids [B, T]."""
    count = int(np.prod(shape))
    return random_integers(f"tokens/{name}", count, config.vocab_size).reshape(shape)


def single(name: str, model: str, about: str, rows: int = 1, length: int = 5, **given: Any) -> Case:
    """Return a case of one call; ``given``: its positions, mask or targets, ``real`` or basic."""
    real, basic = given.pop("real", None), given.pop("basic", False)
    tokens = given.pop("tokens", None)
    if tokens is None:
        tokens = tokens_of(name, CONFIGS[model], rows, length)
    call = Call("prompt", np.asarray(tokens), **given)
    return Case(name, model, about, (call,), real=(real,), basic=basic)


def chunks(name: str, model: str, about: str, lengths: Sequence[int], rows: int = 1) -> Case:
    """Return a case of a sequence in chunks, each after the one before."""
    tokens, ends = tokens_of(name, CONFIGS[model], rows, sum(lengths)), np.cumsum(lengths)
    calls = tuple(
        Call(f"chunk {i}", tokens[:, end - length : end], after=i - 1 if i else None)
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
    )
    return Case(name, model, about, calls, real=(None,) * len(calls))


def with_diagonal(mask: Array) -> Array:
    """Return the mask where each token attends to itself too."""
    return mask | np.eye(mask.shape[-1], dtype=bool)


def padded(real: Ranges, length: int) -> Array:
    """Return the causal mask [B, T, T] of padded rows; padding attends to itself alone."""
    causal = np.tril(np.ones((length, length), dtype=bool))
    inside = np.array([[first <= t < end for t in range(length)] for first, end in real])
    return with_diagonal(causal & inside[:, None, :] & inside[:, :, None])


def padded_positions(real: Ranges, length: int) -> Array:
    """Return positions [B, T] that begin at zero with each row's first real token."""
    return np.array([[max(0, t - first) for t in range(length)] for first, _ in real])


def packed(lengths: Sequence[int]) -> tuple[Array, Array]:
    """Return positions [1, T] and mask [1, T, T] of documents packed into one row."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    return positions, np.tril(owner[:, None] == owner[None])[None]
