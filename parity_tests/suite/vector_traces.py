"""Traces of the golden vectors' cases as a port would write them, for the tests of their check."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_parity.comparison.trace_file import TraceWriter, write_trace
from reference_np.low_precision import round_to

from ..vectors.arithmetic import Arithmetic
from ..vectors.case_parts import Case
from ..vectors.cases import all_cases
from ..vectors.check import Verdict, check
from ..vectors.models import Model, all_models
from ..vectors.results import Operations, Results, arithmetic_operations, expected, run

CASES, MODELS = {case.name: case for case in all_cases()}, all_models()
Port = Callable[[Case, Model], Results | None]  # None: it does not offer the case


def numpy_port(dtype: str, by: Operations | None = None) -> Port:
    """Return NumPy in a precision; of 16 bits every result is rounded."""

    def port(case: Case, model: Model) -> Results | None:
        if dtype in ("float64", "float32"):
            params = {name: value.astype(dtype) for name, value in model.params.items()}
            return run(case, model.config, params, by or Operations())
        if case.steps:
            return None
        rounded = {name: round_to(value, dtype) for name, value in model.params.items()}
        operations = arithmetic_operations(Arithmetic(decimal=False), dtype)
        return run(case, model.config, rounded, operations)

    return port


def backend_port(backend: Any, dtype: str) -> Port:
    """Return a backend of the suite; of steps it takes one at most."""

    def port(case: Case, model: Model) -> Results | None:
        params = {name: _as(value, dtype) for name, value in model.params.items()}
        found, caches = {}, []
        for c, call in enumerate(case.calls):
            cache = None if call.after is None else caches[call.after]
            given = call.tokens, call.positions, call.mask, cache
            activations, after = backend.traced_decode(model.config, params, *given)
            caches.append(after)
            found |= {f"call.{c}.{name}": value for name, value in activations.items()}
        if case.steps:
            if len(case.steps) > 1 or dtype not in ("float64", "float32"):
                return None
            hyper, batches = case.hyperparameters, case.steps[0].batches
            assert hyper is not None
            loss, grads = backend.loss_and_grads(model.config, params, batches, hyper.z_loss)
            found |= {"step.0.loss": np.array(loss)}
            found |= {f"step.0.grad.{name}": value for name, value in grads.items()}
            if case.update:
                done = backend.train(model.config, params, batches, hyper, 1)
                for kind, key in (("param", "params"), ("exp_avg",) * 2, ("exp_avg_sq",) * 2):
                    found |= {f"step.0.{kind}.{name}": v for name, v in done[key].items()}
        return found

    return port


def _as(value: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_case(
    folder: Path, case: Case, results: Mapping[str, Any], dtype: str, **changed: Any
) -> Path:
    """Write one trace with these results; ``changed``: another config, calls, steps or hyper."""

    def fill(writer: TraceWriter) -> None:
        for name, value in results.items():
            kind, at, rest = name.split(".", 2)
            add = writer.add if kind == "call" else writer.add_step
            wide = np.asarray(value)
            as_is = wide.dtype in (np.float64, np.int64)
            add(int(at), rest, wide if as_is else wide.astype(np.float32))

    path = folder / f"{case.name}.safetensors"
    calls, steps = changed.get("calls", case.calls), changed.get("steps", case.steps)
    hyper = changed.get("hyper", case.hyperparameters)
    config = changed.get("config", MODELS[case.model].config)
    write_trace(path, config, calls, dtype, fill, steps=steps, hyperparameters=hyper)
    return path


def write_traces(folder: Path, port: Port, dtype: str) -> None:
    """Write a port's traces of every case that it offers."""
    for case in CASES.values():
        results = port(case, MODELS[case.model])
        if results is not None:
            write_case(folder, case, results, dtype)


def write_basic(folder: Path, dtype: str = "float64") -> Path:
    """Make a folder with right traces of the basic cases; return it."""
    folder.mkdir()
    for case in CASES.values():
        if case.basic:
            write_case(folder, case, expected(case, MODELS[case.model]), dtype)
    return folder


def right(name: str) -> Results:
    """Return the expected results of a case."""
    return expected(CASES[name], MODELS[CASES[name].model])


def verdict_on(
    folder: Path, name: str, results: Mapping[str, Any], dtype: str = "float64", **changed: Any
) -> Verdict:
    """Write a trace of a case with these results; return the verdict on it."""
    write_case(folder, CASES[name], results, dtype, **changed)
    return next(verdict for verdict in check(folder) if verdict.case == name)
