"""Record the activations of a backend of the suite's protocol."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from reference_np import backend as backends
from reference_np.config import InputError, LlamaConfig
from reference_np.limits import Limits, limits_of
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.ops import Array

from .engine_side import Engine, as_arrays, call_backend, offers
from .sides import NOT_COVERED, Advance, Side, is_covered
from .source import Source
from .trace_file import TraceWriter
from .trace_format import Call
from .within_limits import exceeded_limit, require_config

TRAINING_METHODS = ("loss_and_grads", "train")
# What may give other numbers than traced_decode, by which all is judged where it is offered.
METHODS = ("logits", "decode", "start", "append", "trace", "from_directory", *TRAINING_METHODS)


class BackendParams(Mapping[str, Array]):
    """Reads the parameters of ``config``'s layers, in the precision under test.

    They are read anew each time, so that a backend that overwrites one changes only its copy.
    """

    def __init__(self, checkpoint: Source, config: LlamaConfig, dtype: str) -> None:
        self.checkpoint, self.names = checkpoint, list(parameter_shapes(config))
        self.dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)

    def __getitem__(self, name: str) -> Array:
        if name not in self.names:
            raise KeyError(name)
        return self.checkpoint[name].astype(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def make_backend_side(spec: str, dtype: str, checkpoint: Source) -> Side:
    """Return the backend that ``spec`` names as a side of a comparison, in ``dtype``.

    "" stands for float32 or, without it, the backend's first. Raises InputError for a precision
    that it does not compute in, and for a checkpoint outside the limits that it declares.
    """
    backend = backends.load(spec, "--against")
    limits = limits_of(backend)
    require_config(limits, checkpoint, spec)
    known = backends.dtypes_of(backend)
    dtype = dtype or ("float32" if "float32" in known else known[0])
    if dtype not in known:
        raise InputError(
            f"--dtype {dtype}: {spec} computes in {', '.join(known)}; give one of them"
        )

    uncalled: list[str] = []

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        run = _Run(backend, limits, config, BackendParams(checkpoint, config, dtype))
        for index in range(len(calls)):
            found = run.call(calls, index)
            for name in activation_axes(config):
                if name in found:
                    writer.add(index, name, found[name])
            for _ in range(config.n_layers):
                advance()
        uncalled[:] = [name for name in METHODS if offers(backend, name) and name not in run.called]
        return run.coverage

    return Side(spec, dtype, write, backend=spec, limits=limits, uncalled=uncalled)


class _Run:
    """Runs the calls of a comparison on a backend, by what it offers of the protocol."""

    def __init__(
        self, backend: Any, limits: Limits, config: LlamaConfig, params: Mapping[str, Array]
    ) -> None:
        self.backend, self.limits, self.config, self.params = backend, limits, config, params
        self.engine = Engine(backend, config, params)
        self.called = self.engine.called  # names of methods
        self.caches: list[Any] = []
        self.coverage: list[str] = []

    def call(self, calls: Sequence[Call], index: int) -> dict[str, Array]:
        """Run the next call; return its activations or logits, and note how much that is."""
        call, cache = calls[index], None
        found: dict[str, Array] = {}
        if limit := exceeded_limit(self.limits, call):
            covers = f"{NOT_COVERED}, by limit: {limit}"
        elif call.after is not None and not is_covered(self.coverage[call.after]):
            covers = f"{NOT_COVERED}: the call that it continues is not"
            if calls[call.after].after is not None:  # of the first one that continues it
                covers = self.coverage[call.after]
        else:
            before = None if call.after is None else self.caches[call.after]
            found, cache, covers = self._run_call(call, before)
            if cache is None and self.engine.is_offered:
                found, covers = self.engine.run(call, index, found, covers)
        self.caches.append(cache)
        self.coverage.append(covers)
        return found

    def _run_call(self, call: Call, cache: Any) -> tuple[dict[str, Array], Any, str]:
        """Run one call; return the activations or logits, the cache, and which are offered."""
        # Copies: a backend that overwrites its inputs must not change the oracle's.
        inputs = (None if x is None else x.copy() for x in (call.tokens, call.positions, call.mask))
        given = (self.config, self.params, *inputs)
        if call.after is not None and cache is None:
            return {}, None, f"{NOT_COVERED}: decoding is not offered"
        try:
            pair = self._call("traced_decode", call, *given, cache)
            found, cache = _as_pair(pair, "traced_decode")
            return as_arrays(found, "traced_decode"), cache, "activations"
        except NotImplementedError:
            pass
        logits: dict[str, Array] = {}
        try:
            pair = self._call("decode", call, *given, cache)
            decoded, cache = _as_pair(pair, "decode")
            logits = as_arrays({"logits": decoded}, "decode")
        except NotImplementedError as error:
            why, cache = str(error), None
        if call.after is None:
            try:
                found = as_arrays(self._call("trace", call, *given), "trace")
                # People run decode: its logits are judged in place of the trace's.
                return found | logits, cache, "activations"
            except NotImplementedError:
                pass
            try:
                if not logits:
                    alone = self._call("logits", call, *given)
                    logits = as_arrays({"logits": alone}, "logits")
            except NotImplementedError as error:
                why = str(error)
        return logits, cache, "logits" if logits else f"{NOT_COVERED}: {why}"

    def _call(self, name: str, call: Call, *given: Any) -> Any:
        """Return the result of a method on a call; see ``call_backend``."""
        self.called.add(name)
        return call_backend(self.backend, name, f"the call {call.name!r}", *given)


def _as_pair(value: Any, name: str) -> tuple[Any, Any]:
    """Return a method's result, checked to be a pair. Raises InputError for any other."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise InputError(f"--against: {name} must return two things, got {type(value).__name__}")
    return value
