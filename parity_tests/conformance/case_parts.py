"""Parts of the conformance tests: parameters, expected outputs, rows and chunks of a case."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from reference_np.backend import dtypes_of, effective_params_of
from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits, limits_of
from reference_np.model import forward

from .calls import ParityError, checked_parameters, no_exit
from .handed import Handed
from .strategies import Array, Case, Params, cast, padded, unmasked_cases_for
from .training_cases import TrainingCase

ML_DTYPES = {"bfloat16": ml_dtypes.bfloat16}  # those that NumPy knows by no name
# Of a weight's norm: the best rounding to one bit errs by sqrt(1 - 2 / pi) = 0.6 of normal
# numbers, a transposed or permuted matrix by 1.4.
MOST_ROUNDED = 0.8


def best_dtype(backend: Any) -> str:
    """Return the most precise dtype that a backend computes in."""
    return dtypes_of(backend)[0]


def rounded_and_exact_params(
    backend: Any, case: Case | TrainingCase, dtype: str
) -> tuple[Params, Params]:
    """Return the parameters in ``dtype``, and in float64 those that the backend computes with."""
    rounded = cast(case.params, ML_DTYPES.get(dtype, dtype))
    return rounded, _effective(backend, case.config, rounded)


def _effective(backend: Any, config: LlamaConfig, rounded: Params) -> Params:
    """Return the weights that a backend computes with, in float64; arrays of ours alone.

    Raises ParityError where one is no rounding of the weight that is given.
    """
    with no_exit("effective_params"):
        found = effective_params_of(backend, config, Handed(rounded).copies)
    found = checked_parameters("effective weight", dict(found), rounded)
    exact = {name: np.array(value, np.float64) for name, value in found.items()}
    for name, value in exact.items():
        given = rounded[name].astype(np.float64)
        off = np.linalg.norm(value - given) / np.linalg.norm(given)
        if off > MOST_ROUNDED:
            raise ParityError(
                f"effective_params returns another {name} than the one given, off by {off:.0%}: "
                "return the weights given, as they are after quantisation, in the same order"
            )
    return exact


def rounded_to(dtype: str, params: Params) -> Params:
    """Return parameters rounded to ``dtype``, in float64."""
    return cast(cast(params, ML_DTYPES.get(dtype, dtype)), np.float64)


def oracle_logits(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Return the oracle's logits [B, T, V] of one pass without a cache."""
    return forward(params, tokens, config, positions=positions, mask=mask)[0]


def run_in_chunks(method: Callable, case: Case, params: Params, sizes: list[int]) -> list[Any]:
    """Call ``decode`` or ``traced_decode`` on chunks of T; return each call's output, no cache."""
    parts, cache = [], None
    for chunk in np.split(case.tokens, np.cumsum(sizes)[:-1], axis=1):
        part, cache = method(case.config, params, chunk, None, None, cache)
        parts.append(part)
    return parts


def draw_rows(
    backend: Any, data: st.DataObject, dtype: str, limits: Limits | None = None
) -> tuple[LlamaConfig, list[Array], Params, Params]:
    """Draw a config and one to three rows of tokens; also return rounded and exact parameters.

    ``limits`` are the backend's where none are given.
    """
    case = data.draw(unmasked_cases_for(dtype, limits or limits_of(backend)))
    longest = case.tokens.shape[1]
    rows = [row[: data.draw(st.integers(1, longest), label="row length")] for row in case.tokens]
    return case.config, rows, *rounded_and_exact_params(backend, case, dtype)


def draw_side(data: st.DataObject, sides: tuple[bool, ...]) -> bool:
    """Draw the side of the padding, True for the left."""
    return data.draw(st.sampled_from(sides), label="padded on the left")


def appended_sizes(most: int, limits: Limits) -> st.SearchStrategy[int]:
    """Return the strategy of the number of tokens that one call appends to a sequence."""
    return st.integers(1, most if limits.appended == "any" else 1)


def pad_rows(
    rows: list[Array], left: bool, limits: Limits = UNLIMITED
) -> tuple[Array, Array | None, Array, Array]:
    """Return tokens, positions and real [B, T], and mask [B, T, T] third, of padded rows.

    Positions are None where the backend takes no arbitrary ones: to count the padding on the left
    too shifts the positions of a whole row, which changes no result.
    """
    positions, mask, real = padded([len(row) for row in rows], left)
    tokens = np.zeros(real.shape, np.int64)
    tokens[real] = np.concatenate(rows)
    return tokens, positions if limits.positions == "any" else None, mask, real


def training_dtype(backend: Any) -> str:
    """Return the backend's best dtype; skip the test where it is less precise than float32.

    Trained parameters are kept in float32 at least.
    """
    dtype = best_dtype(backend)
    if dtype not in ("float64", "float32"):
        pytest.skip("not covered: training needs float32 or float64")
    return dtype


def concatenated(values: Mapping[str, Array], names: list[str]) -> Array:
    """Return all tensors as one row [1, 1, n], so that an error is relative to all of them."""
    return np.concatenate([np.asarray(values[n], np.float64).ravel() for n in names])[None, None]


def as_row(value: Any) -> Array:
    """Return n numbers as float64 [1, 1, n], the shape [B, T, ...] that errors expects."""
    return np.asarray(value, np.float64).reshape(1, 1, -1)
