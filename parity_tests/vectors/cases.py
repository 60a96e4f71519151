"""The cases of the golden vectors: calls and training steps of the models."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from reference_np.ops import IGNORE

from .case_parts import (
    CONFIGS,
    Case,
    chunks,
    packed,
    padded,
    padded_positions,
    single,
    tokens_of,
    with_diagonal,
)
from .models import BASICS, random_integers
from .reading import Ranges
from .training_cases import gradient_cases, update_cases


def basic_cases() -> Iterable[Case]:
    yield single("basic-one-token", "identity", "one token", tokens=[[3]], basic=True)
    yield single("basic-last-token", "identity", "the last id", tokens=[[15]], basic=True)
    yield single("basic-order", "identity", "two tokens in order", tokens=[[2, 5]], basic=True)
    yield single("basic-reversed", "identity", "the same, reversed", tokens=[[5, 2]], basic=True)
    yield single(
        "basic-rows",
        "identity",
        "two rows: none reads the other",
        tokens=[[1, 2], [9, 4]],
        basic=True,
    )
    for model in [name for name in BASICS if name != "identity"]:
        about = f"matrices are [out, in]: {model.partition('-')[2]}"
        yield single(f"basic-{model}", model, about, tokens=[[3, 8, 1]], basic=True)
    yield single(
        "basic-dtype",
        "float32-weights",
        "weights of 24 bits and int64 tokens",
        tokens=[[7, 1]],
        basic=True,
    )


def plain_cases() -> Iterable[Case]:
    for model in (
        *("gqa", "mha", "mqa", "one-head", "six-heads", "wide-heads", "narrow-heads"),
        *("uneven-heads", "tied", "tied-mha", "narrow-ffn", "square-ffn", "large-vocabulary"),
        *("two-layers", "four-layers", "dim-32", "dim-64", "eps-1e-5", "eps-1e-6", "eps-float32"),
        *("eps-large", "eps-unusual", "theta-500000", "theta-100", "linear", "llama3"),
        *("float32-weights", "outliers", "flat-norms"),
    ):
        yield single(f"causal-{model}", model, "a causal call from position 0")
    yield single("causal-batch", "gqa", "four rows", rows=4, length=3)
    yield single("causal-long", "gqa", "twenty-four tokens", length=24)
    yield single("causal-repeated", "gqa", "one token many times", tokens=[[6, 6, 6, 6, 6]])
    yield single("context-full", "short-context", "as many tokens as the context holds", length=16)


def position_cases() -> Iterable[Case]:
    for name, model, positions, about in (
        ("shifted", "gqa", [[7, 8, 9, 10]], "consecutive from 7"),
        ("over-256", "wide-heads", [[255, 256, 257, 258]], "around 256, where bfloat16 rounds"),
        ("context-end", "gqa", [[60, 61, 62, 63]], "the last of the context"),
        ("far", "long-context", [[65533, 65534, 65535, 65536]], "around 65,536"),
        ("far-rows", "long-context", [[3, 4], [70000, 70001]], "near and far rows"),
        ("last", "long-context", [[0, 131071]], "the first and the last of 131,072"),
        ("far-theta", "theta-1e6", [[0, 30000, 30001]], "far positions, theta 1e6"),
        ("far-linear", "linear-2.5", [[0, 20001, 20002]], "far positions, linear scaling"),
        ("far-llama3", "llama3-released", [[0, 1, 9000, 100000]], "far positions, llama3"),
        ("unusual-llama3", "llama3-unusual", [[0, 40, 90, 300]], "other factors"),
        ("gaps", "gqa", [[0, 3, 4, 11]], "with gaps"),
        ("unordered", "mha", [[9, 2, 30, 2]], "in any order, one twice"),
        ("rows", "gqa", [[0, 1, 2], [5, 6, 7], [11, 3, 0]], "another in each row"),
        ("linear", "linear", [[0, 7, 50]], "linear scaling, some way in"),
        ("llama3", "llama3", [[0, 7, 50, 63]], "llama3 scaling, all three kinds of frequency"),
    ):
        at = np.array(positions)
        yield single(f"positions-{name}", model, f"positions {about}", *at.shape, positions=at)


def mask_cases() -> Iterable[Case]:
    for side, model, real in (
        ("left", "gqa", [[3, 6], [0, 6], [1, 6]]),
        ("right", "gqa", [[0, 3], [0, 6], [0, 5]]),
        ("both", "mha", [[1, 4], [2, 5]]),
    ):
        length = max(end for _, end in real) + (side == "both")
        yield single(
            f"padding-{side}",
            model,
            f"padding, {side} side(s)",
            len(real),
            length,
            positions=padded_positions(real, length),
            mask=padded(real, length),
            real=real,
        )
    real = [[2, 4], [0, 4]]
    blind = padded(real, 4)
    blind[0, :2] = False
    yield single(
        "padding-blind",
        "mqa",
        "padding that attends to nothing",
        2,
        4,
        positions=padded_positions(real, 4),
        mask=blind,
        real=real,
    )
    positions, mask = packed((3, 4))
    yield single("packed", "gqa", "two documents", 1, 7, positions=positions, mask=mask)
    positions, mask = packed((2, 1, 4))
    yield single("packed-three", "mha", "three documents", 1, 7, positions=positions, mask=mask)
    _, mask = packed((3, 3))
    yield single("packed-positions", "gqa", "documents, one count of positions", 1, 6, mask=mask)
    causal = np.tril(np.ones((6, 6), dtype=bool))
    window = np.triu(causal, -2)[None]
    yield single("mask-window", "gqa", "a window of three keys", 1, 6, mask=window)
    prefix = causal.copy()
    prefix[:3, :3] = True
    yield single("mask-prefix", "gqa", "the first three see each other", 1, 6, mask=prefix[None])
    yield single("mask-all", "mha", "every token sees all", 1, 4, mask=np.ones((1, 4, 4), bool))
    free = random_integers("mask-any", 50, 5).reshape(2, 5, 5) < 3
    yield single("mask-any", "gqa", "any keys", 2, 5, mask=with_diagonal(free))


def decode_cases() -> Iterable[Case]:
    for name, model, lengths, about in (
        ("one", "gqa", (4, 1), "a prompt and a step"),
        ("steps", "mha", (3, 1, 1, 1), "a prompt and three steps"),
        ("chunks", "gqa", (3, 2, 4), "chunks of 3, 2 and 4"),
        ("from-one", "mqa", (1, 1, 1), "one token at a time from the first"),
        ("theta", "theta-500000", (3, 1, 1), "theta 500,000"),
        ("llama3", "llama3", (4, 1, 1), "llama3 scaling"),
        ("linear", "linear", (4, 1, 1), "linear scaling"),
        ("layers", "two-layers", (3, 1, 1), "two layers"),
    ):
        yield chunks(f"decode-{name}", model, f"through a cache: {about}", lengths)
    yield chunks("decode-rows", "gqa", "through a cache: three rows", (3, 1, 2), rows=3)
    forked = chunks("decode-fork", "gqa", "two calls continue one cache", (3, 1, 2))
    calls = (*forked.calls[:2], forked.calls[2]._replace(after=0))
    yield replace(forked, calls=calls)
    far = chunks("decode-context-end", "gqa", "through a cache: the end of the context", (2, 1, 1))
    at = [np.array([[60, 61]]), np.array([[62]]), np.array([[63]])]
    yield replace(
        far, calls=tuple(c._replace(positions=p) for c, p in zip(far.calls, at, strict=True))
    )
    yield decode_padded()


def decode_padded() -> Case:
    """Return a left-padded prompt of two rows and two decode steps."""
    case = chunks("decode-padded", "gqa", "through a cache: after left padding", (4, 1, 1), rows=2)
    real: Ranges = [[2, 4], [0, 4]]
    prompt, *steps = case.calls
    calls = [prompt._replace(positions=padded_positions(real, 4), mask=padded(real, 4))]
    for i, step in enumerate(steps):
        seen = np.array([[s >= first for s in range(5 + i)] for first, _ in real])[:, None]
        calls.append(step._replace(positions=np.array([[2 + i], [4 + i]]), mask=seen))
    return replace(case, calls=tuple(calls), real=(real, None, None))


def logprob_cases() -> Iterable[Case]:
    tokens = tokens_of("logprobs", CONFIGS["gqa"], 2, 6)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = IGNORE
    yield single("logprobs", "gqa", "of the next tokens", tokens=tokens, targets=targets)
    given = targets.copy()
    given[0, :3] = IGNORE
    yield single(
        "logprobs-answer", "tied", "of an answer after its prompt", tokens=tokens, targets=given
    )


def all_cases() -> list[Case]:
    """Return every case, the basic ones first."""
    parts = (basic_cases, plain_cases, position_cases, mask_cases, decode_cases, logprob_cases)
    return [case for part in (*parts, gradient_cases, update_cases) for case in part()]
