"""Conformance tests on sequences of up to 300 tokens, causal, in one row.

The others' are of 12 tokens at most, so that a failing one is small. Blocks of keys, windows,
tables and caches of a fixed size, and positions in a narrow type show in none of those.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from reference_np.limits import limits_of

from .case_parts import best_dtype, oracle_logits, rounded_and_exact_params, run_in_chunks
from .check_parts import check_logits, data_given
from .judge import JUDGE
from .strategies import Array, Case, Params, long_cases

pytestmark = pytest.mark.numeric

NEW = 3  # tokens that continue a prompt, one in each call


@pytest.mark.needs("logits")
@data_given
def test_long_logits(backend: Any, data: st.DataObject) -> None:
    """Logits of a long sequence."""
    check_logits(backend, best_dtype(backend), data.draw(long_cases(limits_of(backend))))


@pytest.mark.needs("decode")
@data_given
def test_long_decoding(backend: Any, data: st.DataObject) -> None:
    """Logits of a long prompt, in one call or halves, and of tokens that continue it."""
    case, low, exact, dtype = _drawn(backend, data)
    length = case.tokens.shape[1] - NEW
    sizes = [length] + [1] * NEW
    if limits_of(backend).appended == "any" and data.draw(st.booleans(), label="in halves"):
        sizes = [length // 2, length - length // 2] + [1] * NEW

    def run(model: Any) -> Mapping[str, Array]:
        parts = run_in_chunks(model.decode, case, low, sizes)
        return {"logits": np.concatenate([np.asarray(part) for part in parts], axis=1)}

    JUDGE.compare(backend, dtype, run, {"logits": oracle_logits(exact, case.config, case.tokens)})


@pytest.mark.needs("start")
@data_given
def test_long_engine(backend: Any, data: st.DataObject) -> None:
    """An engine's next-token logits after a long prompt, and after each token that continues it."""
    case, low, exact, dtype = _drawn(backend, data)
    prompt, *new = np.split(case.tokens, np.arange(-NEW, 0), axis=1)
    expected = oracle_logits(exact, case.config, case.tokens)[:, -NEW - 1 :]

    def run(model: Any) -> Mapping[str, Array]:
        logits = [model.start(case.config, low, list(prompt)), *map(model.append, new)]
        return {"logits": np.stack([np.asarray(part) for part in logits], axis=1)}

    JUDGE.compare(backend, dtype, run, {"logits": expected})


def _drawn(backend: Any, data: st.DataObject) -> tuple[Case, Params, Params, str]:
    """Draw a long case; return it, its parameters rounded and exact, and their dtype."""
    dtype = best_dtype(backend)
    case = data.draw(long_cases(limits_of(backend)))
    return case, *rounded_and_exact_params(backend, case, dtype), dtype
