"""Parts of the conformance tests themselves: how they draw, and the comparison of logits."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from .case_parts import oracle_logits, rounded_and_exact_params
from .judge import JUDGE
from .strategies import Case

data_given = given(data=st.data())


def check_logits(backend: Any, dtype: str, case: Case) -> None:
    """Compare the logits of one case with the oracle's."""
    low, exact = rounded_and_exact_params(backend, case, dtype)
    inputs = (case.tokens, case.positions, case.mask)
    expected = oracle_logits(exact, case.config, *inputs)
    JUDGE.compare(
        backend,
        dtype,
        lambda model: {"logits": model.logits(case.config, low, *inputs)},
        {"logits": expected},
    )
