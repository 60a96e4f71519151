"""What any implementation of Llama must compute; see reference_np/backend.py for how to be tested.

Each test runs on every backend, in the precision named or in the backend's best. A scenario is
a function of an implementation, so that the plain baseline of low precision goes the same way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import optim
from reference_np.backend import dtypes_of, effective_params_of
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.naming import activation_axes

from .judge import JUDGE
from .oracle import Oracle
from .strategies import Array, Case, Params, calls, model_for, packed, padded, splits
from .training_cases import STEPS_TOLERANCE, TrainingCase, training_for

pytestmark = pytest.mark.numeric

STORED = {"bfloat16": ml_dtypes.bfloat16}
data_given = given(data=st.data())


def best(backend: Any) -> str:
    return dtypes_of(backend)[0]


def stored(backend: Any, case: Case | TrainingCase, dtype: str) -> tuple[Params, Params]:
    """Return the parameters rounded to ``dtype``, and what the backend makes of them in float64."""
    low = {n: v.astype(STORED.get(dtype, dtype)) for n, v in case.params.items()}
    return low, effective_params_of(backend, case.config, low)


def in_one_pass(params: Params, config: LlamaConfig, tokens: Array, **given: Any) -> Array:
    return forward(params, tokens, config, **given)[0]


def check_call(backend: Any, dtype: str, case: Case) -> None:
    low, exact = stored(backend, case, dtype)
    given = {"positions": case.positions, "mask": case.mask}
    expected = in_one_pass(exact, case.config, case.tokens, **given)
    JUDGE.compare(
        backend,
        dtype,
        lambda it: {"logits": it.logits(case.config, low, case.tokens, case.positions, case.mask)},
        {"logits": expected},
    )


@pytest.mark.needs("logits")
@data_given
def test_logits(backend: Any, data: st.DataObject) -> None:
    """Any architecture, positions and mask."""
    check_call(backend, best(backend), data.draw(calls(best(backend))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.needs("logits")
@data_given
def test_logits_in(backend: Any, dtype: str, data: st.DataObject) -> None:
    """The lower precisions, beside plain NumPy in the same one."""
    check_call(backend, dtype, data.draw(calls(dtype)))


@pytest.mark.needs("trace")
@data_given
def test_trace(backend: Any, data: st.DataObject) -> None:
    """Every activation by its name; a missing one fails."""
    dtype = best(backend)
    case = data.draw(calls(dtype))
    low, exact = stored(backend, case, dtype)
    given = (case.tokens, case.positions, case.mask)
    expected = Oracle().trace(case.config, exact, *given)
    assert list(expected) == list(activation_axes(case.config))
    JUDGE.compare(backend, dtype, lambda it: it.trace(case.config, low, *given), expected)


@pytest.mark.needs("logits")
@data_given
def test_padding(backend: Any, data: st.DataObject) -> None:
    """Rows of unequal length, padded on either side: each equals its own single run."""
    dtype = best(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    left = data.draw(st.booleans(), label="padded on the left")
    tokens, positions, mask, real = pad(rows, left)
    expected = {
        f"row {i}": in_one_pass(exact, config, row[None])[0][None] for i, row in enumerate(rows)
    }

    def run(it: Any) -> Mapping[str, Array]:
        logits = np.asarray(it.logits(config, low, tokens, positions, mask))
        return {f"row {i}": logits[i][real[i]][None] for i in range(len(rows))}

    JUDGE.compare(backend, dtype, run, expected)


@pytest.mark.needs("logits")
@data_given
def test_packing(backend: Any, data: st.DataObject) -> None:
    """Documents laid end to end under a block-diagonal mask equal separate ones."""
    dtype = best(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    positions, mask = packed([len(row) for row in rows])
    alone = [in_one_pass(exact, config, row[None]) for row in rows]
    tokens = np.concatenate(rows)[None]
    JUDGE.compare(
        backend,
        dtype,
        lambda it: {"logits": it.logits(config, low, tokens, positions, mask)},
        {"logits": np.concatenate(alone, axis=1)},
    )


def in_chunks(method: Callable, case: Case, params: Params, sizes: list[int]) -> list[Any]:
    """Feed a case to ``decode`` or its like in chunks; return what each call gave but its cache."""
    parts, cache = [], None
    for chunk in np.split(case.tokens, np.cumsum(sizes)[:-1], axis=1):
        part, cache = method(case.config, params, chunk, None, None, cache)
        parts.append(part)
    return parts


@pytest.mark.needs("decode")
@data_given
def test_chunks(backend: Any, data: st.DataObject) -> None:
    """Prefill in any chunks and decoding from any cache length equal one pass."""
    dtype = best(backend)
    case = data.draw(model_for(dtype))
    low, exact = stored(backend, case, dtype)
    sizes = data.draw(splits(case.tokens.shape[1]))
    expected = in_one_pass(exact, case.config, case.tokens)

    def run(it: Any) -> Mapping[str, Array]:
        parts = in_chunks(it.decode, case, low, sizes)
        return {"logits": np.concatenate([np.asarray(part) for part in parts], axis=1)}

    JUDGE.compare(backend, dtype, run, {"logits": expected})


@pytest.mark.needs("traced_decode")
@data_given
def test_traced_chunks(backend: Any, data: st.DataObject) -> None:
    """Every activation of calls that continue a cache."""
    dtype = best(backend)
    case = data.draw(model_for(dtype))
    low, exact = stored(backend, case, dtype)
    sizes = data.draw(splits(case.tokens.shape[1]))

    def run(it: Any, params: Params = low) -> Mapping[str, Array]:
        parts = in_chunks(it.traced_decode, case, params, sizes)
        return {f"{i} {name}": part[name] for i, part in enumerate(parts) for name in part}

    JUDGE.compare(backend, dtype, run, run(Oracle(), exact))


@pytest.mark.needs("decode")
@data_given
def test_padded_decoding(backend: Any, data: st.DataObject) -> None:
    """After a padded prefill, each row's new tokens equal the row continued alone."""
    dtype = best(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    n_new = data.draw(st.integers(1, 3), label="new tokens")
    seed = data.draw(st.integers(0, 999), label="new tokens seed")
    new = np.random.default_rng(seed).integers(0, config.vocab_size, (len(rows), n_new))
    tokens, positions, mask, real = pad(rows, data.draw(st.booleans(), label="left"))
    expected = {
        f"row {i}": in_one_pass(exact, config, np.concatenate([row, new[i]])[None])[:, len(row) :]
        for i, row in enumerate(rows)
    }
    lengths = np.array([len(row) for row in rows])[:, None]
    ahead = lengths + np.arange(n_new)
    shape = (len(rows), n_new, n_new)
    seen = np.broadcast_to(real[:, None], (len(rows), n_new, tokens.shape[1]))
    seen = np.concatenate([seen, np.broadcast_to(np.tril(np.ones(shape[1:], bool)), shape)], 2)

    def run(it: Any) -> Mapping[str, Array]:
        _, cache = it.decode(config, low, tokens, positions, mask, None)
        logits, _ = it.decode(config, low, new, ahead, seen, cache)
        return {f"row {i}": np.asarray(logits)[i][None] for i in range(len(rows))}

    JUDGE.compare(backend, dtype, run, expected)


@pytest.mark.needs("decode")
@data_given
def test_a_cache_is_a_value(backend: Any, data: st.DataObject) -> None:
    """A cache continued, then continued again: the second time gives the same."""
    dtype = best(backend)
    case = data.draw(model_for(dtype))
    low, exact = stored(backend, case, dtype)
    tokens = np.concatenate([case.tokens, case.tokens[:, :1]], axis=1)
    expected = in_one_pass(exact, case.config, tokens)[:, -1:]

    def run(it: Any) -> Mapping[str, Array]:
        _, cache = it.decode(case.config, low, tokens[:, :-1], None, None, None)
        first, longer = it.decode(case.config, low, tokens[:, -1:], None, None, cache)
        it.decode(case.config, low, tokens[:, :1], None, None, longer)
        second, _ = it.decode(case.config, low, tokens[:, -1:], None, None, cache)
        return {"first": np.asarray(first), "second": np.asarray(second)}

    JUDGE.compare(backend, dtype, run, {"first": expected, "second": expected})


def draw_rows(
    backend: Any, data: st.DataObject, dtype: str
) -> tuple[LlamaConfig, list[Array], Params, Params]:
    """A model and one to three rows of tokens, with its parameters rounded and exact."""
    case = data.draw(model_for(dtype))
    longest = case.tokens.shape[1]
    rows = [row[: data.draw(st.integers(1, longest), label="row length")] for row in case.tokens]
    return case.config, rows, *stored(backend, case, dtype)


def pad(rows: list[Array], left: bool) -> tuple[Array, Array, Array, Array]:
    positions, mask, real = padded([len(row) for row in rows], left)
    tokens = np.zeros(real.shape, np.int64)
    tokens[real] = np.concatenate(rows)
    return tokens, positions, mask, real


@pytest.mark.needs("loss_and_grads")
@data_given
def test_loss_and_grads(backend: Any, data: st.DataObject) -> None:
    """The loss and every gradient, over micro-batches of unequal valid counts."""
    dtype = trains_in(backend)
    case = data.draw(training_for(dtype))
    low, exact = stored(backend, case, dtype)
    loss, grads = optim.accumulate(exact, case.batches, case.config, case.hyper.z_loss)
    names = list(exact)

    def run(it: Any) -> Mapping[str, Array]:
        found = it.loss_and_grads(case.config, low, case.batches, case.hyper.z_loss)
        return {"loss": row(found[0]), "gradients": flat(found[1], names)}

    expected = {"loss": row(loss), "gradients": flat(grads, names)}
    JUDGE.compare(backend, dtype, run, expected, average=True)


@pytest.mark.needs("train")
@pytest.mark.parametrize("steps", [1, 3, 10])
@data_given
def test_training(backend: Any, steps: int, data: st.DataObject) -> None:
    """Whole optimizer steps: losses, norms, parameters and both moments."""
    dtype = trains_in(backend)
    case = data.draw(training_for(dtype, conditioned=steps > 1))
    low, exact = stored(backend, case, dtype)
    names = list(exact)

    def run(it: Any, params: Params = low) -> Mapping[str, Array]:
        found = it.train(case.config, params, case.batches, case.hyper, steps)
        kinds = {n: flat(found[n], names) for n in ("exp_avg", "exp_avg_sq")}
        moved = {n: np.asarray(found["params"][n], np.float64) - exact[n] for n in names}
        # As a model fits its batch the gradient vanishes, by cancellation; its error is what
        # the parameters' rounding makes of it, on the scale of the gradients that moved them.
        kinds["params"] = flat(found["params"] if dtype == "float64" else moved, names)
        return kinds | {n: row(found[n]) for n in ("loss", "grad_norm")}

    expected = run(Oracle(), exact)
    JUDGE.compare(backend, dtype, run, expected, logic=STEPS_TOLERANCE, average=True)


def trains_in(backend: Any) -> str:
    """The best precision, and no less than float32: below it nobody keeps trained parameters."""
    dtype = best(backend)
    if dtype not in ("float64", "float32"):
        pytest.skip("not covered: training needs float32 or float64")
    return dtype


def flat(values: Mapping[str, Array], names: list[str]) -> Array:
    """Every tensor in one row [1, 1, n]: each is measured on the scale of them all."""
    return np.concatenate([np.asarray(values[n], np.float64).ravel() for n in names])[None, None]


def row(value: Any) -> Array:
    return np.asarray(value, np.float64).reshape(1, 1, -1)
