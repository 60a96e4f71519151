"""Conformance tests of a Llama: every output of a backend against the oracle's.

reference_np/backend.py has the protocol. The argument ``backend`` runs over the backends that
plugins/backend_option.py selects (``--backend``, ``--mutants``, or the default ones), which also
sets the number of examples; each test is run in the precision named, or in the backend's best. In
a low precision the function ``run`` is called on the backend and on the baseline.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from reference_np import optim
from reference_np.limits import limits_of
from reference_np.naming import activation_axes

from .case_parts import (
    appended_sizes,
    as_row,
    best_dtype,
    concatenated,
    draw_rows,
    draw_side,
    oracle_logits,
    pad_rows,
    rounded_and_exact_params,
    run_in_chunks,
    training_dtype,
)
from .check_parts import check_logits, data_given
from .judge import JUDGE
from .oracle import Oracle
from .scope import decoding_sides
from .strategies import (
    Array,
    Params,
    cases_for,
    chunk_sizes,
    packed,
    unmasked_cases_for,
)
from .training_cases import STEPS_TOLERANCE, training_cases_for

pytestmark = pytest.mark.numeric


@pytest.mark.needs("logits")
@data_given
def test_logits(backend: Any, data: st.DataObject) -> None:
    """Logits of any architecture, positions and mask."""
    dtype = best_dtype(backend)
    check_logits(backend, dtype, data.draw(cases_for(dtype, limits_of(backend))))


@pytest.mark.needs("logits")
@data_given
def test_causal_logits(backend: Any, data: st.DataObject) -> None:
    """Logits under the causal mask and at the default positions, which every backend has."""
    dtype = best_dtype(backend)
    check_logits(backend, dtype, data.draw(unmasked_cases_for(dtype, limits_of(backend))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.needs("logits")
@data_given
def test_logits_in(backend: Any, dtype: str, data: st.DataObject) -> None:
    """Logits in a lower precision, beside the baseline's."""
    check_logits(backend, dtype, data.draw(cases_for(dtype, limits_of(backend))))


@pytest.mark.needs("trace")
@data_given
def test_trace(backend: Any, data: st.DataObject) -> None:
    """Every activation by its name; a missing one fails."""
    dtype = best_dtype(backend)
    case = data.draw(cases_for(dtype, limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    inputs = (case.tokens, case.positions, case.mask)
    expected = Oracle().trace(case.config, exact, *inputs)
    assert list(expected) == list(activation_axes(case.config))
    JUDGE.compare(backend, dtype, lambda model: model.trace(case.config, low, *inputs), expected)


@pytest.mark.needs("logits")
@data_given
def test_padding(backend: Any, data: st.DataObject) -> None:
    """Logits of rows padded on either side equal those of each row alone."""
    dtype = best_dtype(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    limits = limits_of(backend)
    left = draw_side(data, limits.padding_sides)
    tokens, positions, mask, real = pad_rows(rows, left, limits)
    expected = {
        f"row {i}": oracle_logits(exact, config, row[None])[0][None] for i, row in enumerate(rows)
    }

    def run(model: Any) -> Mapping[str, Array]:
        logits = np.asarray(model.logits(config, low, tokens, positions, mask))
        return {f"row {i}": logits[i][real[i]][None] for i in range(len(rows))}

    JUDGE.compare(backend, dtype, run, expected)


@pytest.mark.needs("logits")
@data_given
def test_packing(backend: Any, data: st.DataObject) -> None:
    """Logits of packed documents under a block-diagonal mask equal those of each alone."""
    dtype = best_dtype(backend)
    limits = limits_of(backend)
    several = replace(limits, batch=None)  # documents, which are packed into one row
    config, rows, low, exact = draw_rows(backend, data, dtype, several)
    if limits.context:
        rows = [row[: limits.context // len(rows)] for row in rows]
    block, mask = packed([len(row) for row in rows])
    positions = block if limits.positions == "any" else None
    alone = [oracle_logits(exact, config, row[None]) for row in rows]
    tokens = np.concatenate(rows)[None]
    JUDGE.compare(
        backend,
        dtype,
        lambda model: {"logits": model.logits(config, low, tokens, positions, mask)},
        {"logits": np.concatenate(alone, axis=1)},
    )


@pytest.mark.needs("decode")
@data_given
def test_chunked_decoding(backend: Any, data: st.DataObject) -> None:
    """Logits of prefill in any chunks and of decoding equal those of one pass."""
    dtype = best_dtype(backend)
    case = data.draw(unmasked_cases_for(dtype, limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    sizes = data.draw(chunk_sizes(case.tokens.shape[1], limits_of(backend)))
    expected = oracle_logits(exact, case.config, case.tokens)

    def run(model: Any) -> Mapping[str, Array]:
        parts = run_in_chunks(model.decode, case, low, sizes)
        return {"logits": np.concatenate([np.asarray(part) for part in parts], axis=1)}

    JUDGE.compare(backend, dtype, run, {"logits": expected})


@pytest.mark.needs("traced_decode")
@data_given
def test_chunked_trace(backend: Any, data: st.DataObject) -> None:
    """Every activation of chunks that continue a cache equals the oracle's."""
    dtype = best_dtype(backend)
    case = data.draw(unmasked_cases_for(dtype, limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    sizes = data.draw(chunk_sizes(case.tokens.shape[1], limits_of(backend)))

    def run(model: Any, params: Params = low) -> Mapping[str, Array]:
        parts = run_in_chunks(model.traced_decode, case, params, sizes)
        return {f"{i} {name}": part[name] for i, part in enumerate(parts) for name in part}

    JUDGE.compare(backend, dtype, run, run(Oracle(), exact))


@pytest.mark.needs("decode")
@data_given
def test_padded_decoding(backend: Any, data: st.DataObject) -> None:
    """Logits of new tokens after a padded prefill equal those of each row continued alone."""
    dtype = best_dtype(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    limits = limits_of(backend)
    n_new = data.draw(appended_sizes(3, limits), label="new tokens")
    seed = data.draw(st.integers(0, 999), label="new tokens seed")
    new = np.random.default_rng(seed).integers(0, config.vocab_size, (len(rows), n_new))
    left = draw_side(data, decoding_sides(limits))
    tokens, positions, mask, real = pad_rows(rows, left, limits)
    expected = {
        f"row {i}": oracle_logits(exact, config, np.concatenate([row, new[i]])[None])[:, len(row) :]
        for i, row in enumerate(rows)
    }
    lengths = np.array([len(row) for row in rows])[:, None]
    new_positions = None if positions is None else lengths + np.arange(n_new)
    # A new token may attend to the real prompt tokens and to the new ones up to itself.
    of_prompt = np.broadcast_to(real[:, None], (len(rows), n_new, tokens.shape[1]))
    of_new = np.broadcast_to(np.tril(np.ones((n_new, n_new), bool)), (len(rows), n_new, n_new))
    new_mask = np.concatenate([of_prompt, of_new], axis=2)

    def run(model: Any) -> Mapping[str, Array]:
        _, cache = model.decode(config, low, tokens, positions, mask, None)
        logits, _ = model.decode(config, low, new, new_positions, new_mask, cache)
        return {f"row {i}": np.asarray(logits)[i][None] for i in range(len(rows))}

    JUDGE.compare(backend, dtype, run, expected)


@pytest.mark.needs("decode")
@data_given
def test_reused_cache(backend: Any, data: st.DataObject) -> None:
    """A cache continued twice gives the same logits both times: a call must not change it."""
    dtype = best_dtype(backend)
    case = data.draw(unmasked_cases_for(dtype, limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    tokens = np.concatenate([case.tokens, case.tokens[:, :1]], axis=1)
    expected = oracle_logits(exact, case.config, tokens)[:, -1:]

    def run(model: Any) -> Mapping[str, Array]:
        _, cache = model.decode(case.config, low, tokens[:, :-1], None, None, None)
        first, longer = model.decode(case.config, low, tokens[:, -1:], None, None, cache)
        model.decode(case.config, low, tokens[:, :1], None, None, longer)
        second, _ = model.decode(case.config, low, tokens[:, -1:], None, None, cache)
        return {"first": np.asarray(first), "second": np.asarray(second)}

    JUDGE.compare(backend, dtype, run, {"first": expected, "second": expected})


@pytest.mark.needs("start")
@data_given
def test_engine(backend: Any, data: st.DataObject) -> None:
    """An engine's next-token logits after prompts and after each append; start forgets."""
    dtype = best_dtype(backend)
    config, rows, low, exact = draw_rows(backend, data, dtype)
    limits = limits_of(backend)
    if limits.equal_rows:
        rows = [row[: min(map(len, rows))] for row in rows]
    calls = st.lists(appended_sizes(2, limits), min_size=1, max_size=2)
    sizes = data.draw(calls, label="appended")
    seed = data.draw(st.integers(0, 999), label="new tokens seed")
    new = np.random.default_rng(seed).integers(0, config.vocab_size, (len(rows), sum(sizes)))
    chunks = np.split(new, np.cumsum(sizes)[:-1], axis=1)

    def run(model: Any, params: Params = low) -> Mapping[str, Array]:
        model.start(config, params, [row[::-1] for row in rows])  # to be forgotten
        outputs = {"start": model.start(config, params, rows)}
        outputs |= {f"append {i}": model.append(chunk) for i, chunk in enumerate(chunks)}
        return {name: np.asarray(logits)[:, None] for name, logits in outputs.items()}

    JUDGE.compare(backend, dtype, run, run(Oracle(), exact))


@pytest.mark.needs("loss_and_grads")
@data_given
def test_loss_and_grads(backend: Any, data: st.DataObject) -> None:
    """The mean loss and all gradients as one vector, over micro-batches of unequal valid counts."""
    dtype = training_dtype(backend)
    case = data.draw(training_cases_for(dtype, limits=limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    loss, grads = optim.accumulate(exact, case.batches, case.config, case.hyper.z_loss)
    names = list(exact)

    def run(model: Any) -> Mapping[str, Array]:
        loss, grads = model.loss_and_grads(case.config, low, case.batches, case.hyper.z_loss)
        return {"loss": as_row(loss), "gradients": concatenated(grads, names)}

    expected = {"loss": as_row(loss), "gradients": concatenated(grads, names)}
    JUDGE.compare(backend, dtype, run, expected, rms_only=True)


@pytest.mark.needs("train")
@pytest.mark.parametrize("steps", [1, 3, 10])
@data_given
def test_training(backend: Any, steps: int, data: st.DataObject) -> None:
    """Losses, gradient norms, parameters and moments of optimizer steps; float64 to 1e-9."""
    dtype = training_dtype(backend)
    case = data.draw(training_cases_for(dtype, steps > 1, limits_of(backend)))
    low, exact = rounded_and_exact_params(backend, case, dtype)
    names = list(exact)

    def run(model: Any, params: Params = low) -> Mapping[str, Array]:
        trained = model.train(case.config, params, case.batches, case.hyper, steps)
        outputs = {n: concatenated(trained[n], names) for n in ("exp_avg", "exp_avg_sq")}
        change = {n: np.asarray(trained["params"][n], np.float64) - exact[n] for n in names}
        # In float32 the change of the parameters is compared: relative to the parameters, which
        # are much larger than their change in a few steps, an error of the update would not show.
        outputs["params"] = concatenated(trained["params"] if dtype == "float64" else change, names)
        return outputs | {n: as_row(trained[n]) for n in ("loss", "grad_norm")}

    expected = run(Oracle(), exact)
    JUDGE.compare(backend, dtype, run, expected, tolerance=STEPS_TOLERANCE, rms_only=True)
