"""Mutated files of every kind: each is read, or refused by one InputError, within bounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Change
from .kinds import KINDS, MODELS, Kind, oracle_model, torch_model
from .outcomes import outcome

TOTAL = 100_000  # examples of all kinds in the profile ``thorough``
N_TESTS = len(KINDS) + len(MODELS)


def n_examples() -> int:
    """Return the number of examples of each kind."""
    n = settings.default.max_examples
    return -(-TOTAL // N_TESTS) if n >= 2000 else -(-n // 5)


def mutated(kind: Kind, content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy of a kind's file, mutated."""
    return st.randoms(use_true_random=False).map(lambda random: kind.mutate(random, content))


def names(kinds: tuple[Kind, ...]) -> list[str]:
    return [kind.name for kind in kinds]


def valid(kind: Kind, built: Callable[[str], Path]) -> bytes:
    """Return a kind's valid file; skip the test where no package here writes it."""
    path = built(kind.folder) / kind.file
    if not path.exists():
        pytest.skip(f"no package here writes {path.suffix}")
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=names(KINDS))
def test_a_valid_file_is_read(kind: Kind, built: Callable[[str], Path], changed: Change) -> None:
    content = valid(kind, built)
    with changed(kind, content) as folder:
        assert kind.outcome(folder).refusal is None


@settings(max_examples=n_examples())
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS, ids=names(KINDS))
def test_a_mutated_file_is_read_or_refused_in_one_line(
    kind: Kind, built: Callable[[str], Path], changed: Change, data: st.DataObject
) -> None:
    content = data.draw(mutated(kind, valid(kind, built)))
    with changed(kind, content) as folder:
        kind.outcome(folder)


@settings(max_examples=n_examples())
@given(data=st.data())
@pytest.mark.parametrize("kind", MODELS, ids=names(MODELS))
def test_two_readers_of_one_format_agree(
    kind: Kind, built: Callable[[str], Path], changed: Change, data: st.DataObject
) -> None:
    content = data.draw(mutated(kind, valid(kind, built)))
    with changed(kind, content) as folder:
        ours = outcome(torch_model, folder)
        theirs = outcome(oracle_model, folder, "reference_np")
        assert (ours.refusal is None) == (theirs.refusal is None), (ours.refusal, theirs.refusal)
        if ours.refusal is None:
            require_equal(ours.value, theirs.value)


def require_equal(ours: Any, theirs: Any) -> None:
    """Assert that two readers' configs and weights are equal."""
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, weight in ours[1].items():
        assert np.array_equal(weight, theirs[1][name], equal_nan=True), name
