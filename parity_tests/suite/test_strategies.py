"""The strategies draw every corner case that they are made for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from ..conformance.drawn import SEARCH
from ..conformance.strategies import (
    Case,
    cases,
    cases_for,
    chunk_sizes,
    padded,
    unmasked_cases_for,
    wide_cases,
)
from ..conformance.training_cases import TrainingCase, training_cases, training_cases_for


def embedding_sizes(case: Case) -> Any:
    return np.sqrt(np.mean(case.params["model.embed_tokens.weight"] ** 2, axis=1))


CORNERS: dict[str, tuple[st.SearchStrategy, Callable[[Any], bool]]] = {
    "n_rep != n_kv_heads": (
        cases(),
        lambda c: c.config.n_rep > 1 and 1 < c.config.n_kv_heads != c.config.n_rep,
    ),
    "multi-head": (cases(), lambda c: c.config.n_rep == 1 and c.config.n_heads > 1),
    "one key head for many": (cases(), lambda c: c.config.n_kv_heads == 1 < c.config.n_heads),
    "odd head counts": (cases(), lambda c: c.config.n_heads % 2 == 1 < c.config.n_kv_heads),
    "head_dim != dim / n_heads": (
        cases(),
        lambda c: c.config.head_dim * c.config.n_heads != c.config.dim,
    ),
    "dim a multiple of n_heads": (
        cases(),
        lambda c: c.config.n_heads > 2 and c.config.dim % c.config.n_heads == 0,
    ),
    "positions past 4096": (cases_for("float64"), lambda c: 4095 <= highest(c) < 65_536),
    "positions past 65,536": (cases_for("float64"), lambda c: highest(c) > 65_536),
    "default positions": (cases_for("float64"), lambda c: c.positions is None and c.mask is None),
    "custom mask": (cases_for("float64"), lambda c: c.mask is not None and not c.mask.all()),
    "a query that sees nothing": (
        cases(),
        lambda c: c.mask is not None and not c.mask.any(axis=-1).all(),
    ),
    "single token": (cases_for("float64"), lambda c: c.tokens.shape[1] == 1),
    "batch": (cases_for("float64"), lambda c: len(c.tokens) == 3),
    "tied": (cases_for("float64"), lambda c: c.config.tie_embeddings),
    "untied": (cases_for("float64"), lambda c: not c.config.tie_embeddings),
    "large weights": (
        cases_for("float64"),
        lambda c: max(np.abs(v).max() for n, v in c.params.items() if v.ndim == 1) > 3,
    ),
    "near-zero rows": (
        cases_for("float64"),
        lambda c: (
            c.config.vocab_size > 1
            and embedding_sizes(c).min() < 1e-6
            and embedding_sizes(c).max() > 1e-4
        ),
    ),
    "low precision, masked": (cases_for("bfloat16"), lambda c: c.mask is not None),
    "low precision, past 65,536": (cases_for("bfloat16"), lambda c: highest(c) > 65_536),
    "low precision, grouped": (wide_cases(), lambda c: c.config.n_heads > c.config.n_kv_heads > 1),
    "decoding one by one": (chunk_sizes(6), lambda sizes: sizes == [1] * 6),
    "chunked prefill": (chunk_sizes(6), lambda sizes: len(sizes) > 1 and max(sizes) > 1),
    "prefill, then one": (chunk_sizes(6), lambda sizes: sizes == [5, 1]),
    "micro-batches of unequal counts": (
        training_cases(),
        lambda c: len({int((b.targets >= 0).sum()) for b in c.batches}) > 1,
    ),
    "clipping": (training_cases(), lambda c: c.hyper.grad_clip < 1),
    "z-loss": (training_cases(), lambda c: c.hyper.z_loss > 0),
    "unequal counts, masks, z-loss and clipping in float32": (
        training_cases_for("float32"),
        lambda c: (
            len({int((b.targets >= 0).sum()) for b in c.batches}) > 1
            and any(b.mask is not None for b in c.batches)
            and c.hyper.z_loss > 0
            and c.hyper.grad_clip <= 1
        ),
    ),
}


def highest(case: Case) -> int:
    return -1 if case.positions is None else int(case.positions.max())


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_are_reached(corner: str) -> None:
    strategy, reached = CORNERS[corner]
    find(strategy, reached, settings=SEARCH)


@pytest.mark.parametrize(
    ("strategy", "out_of_reach"),
    [
        (unmasked_cases_for("float64"), lambda c: c.config.n_kv_heads > 4),
        (training_cases(), lambda c: isinstance(c, TrainingCase) and not c.batches),
    ],
    ids=["cases", "training cases"],
)
def test_a_corner_out_of_reach_would_be_seen(
    strategy: st.SearchStrategy, out_of_reach: Callable[[Any], bool]
) -> None:
    with pytest.raises(NoSuchExample):
        find(strategy, out_of_reach, settings=settings(SEARCH, max_examples=100))


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_what_it_says(left: bool) -> None:
    positions, mask, real = padded([2, 4], left)
    assert real.tolist() == [[not left] * 2 + [left] * 2, [True] * 4]
    assert positions[0][real[0]].tolist() == [0, 1]
    assert positions[1].tolist() == [0, 1, 2, 3]
    for row in range(2):
        seen = mask[row][np.ix_(real[row], real[row])]
        assert np.array_equal(seen, np.tril(np.ones_like(seen)))
        assert not mask[row][np.ix_(real[row], ~real[row])].any()
    assert mask[:, np.arange(4), np.arange(4)].all()


def test_calls_let_every_query_see_itself() -> None:
    case = find(
        cases_for("float64"),
        lambda c: c.mask is not None and c.tokens.shape[1] > 3 and not c.mask.all(),
        settings=SEARCH,
    )
    assert case.mask[:, range(case.mask.shape[1]), range(case.mask.shape[1])].all()
