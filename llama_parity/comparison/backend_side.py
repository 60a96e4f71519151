"""Record the activations of a backend of the suite's protocol."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from reference_np import backend as backends
from reference_np.config import InputError, LlamaConfig
from reference_np.limits import limits_of
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.ops import Array
from reference_np.refusals import is_own_refusal

from .sides import Advance, Side, is_covered
from .source import Source
from .trace_file import TraceWriter
from .trace_format import Call
from .within_limits import exceeded_limit, require_config


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

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        params = BackendParams(checkpoint, config, dtype)
        caches: list[Any] = []
        coverage: list[str] = []
        for index, call in enumerate(calls):
            found: dict[str, Array] = {}
            cache = None
            if limit := exceeded_limit(limits, call):
                covers = f"not covered, by limit: {limit}"
            elif call.after is not None and not is_covered(coverage[call.after]):
                covers = "not covered: the call that it continues is not"
                if calls[call.after].after is not None:  # of the first one that continues it
                    covers = coverage[call.after]
            else:
                before = None if call.after is None else caches[call.after]
                found, cache, covers = _run_call(backend, config, params, call, before)
            caches.append(cache)
            coverage.append(covers)
            for name in activation_axes(config):
                if name in found:
                    writer.add(index, name, found[name])
            for _ in range(config.n_layers):
                advance()
        return coverage

    return Side(spec, dtype, write, backend=spec, limits=limits)


def call_backend(backend: Any, name: str, purpose: str, *arguments: Any) -> Any:
    """Return the result of a backend's method; ``purpose`` completes "failed on ..." in an error.

    Raises NotImplementedError where the method is missing or raises it in the backend's own file,
    and InputError, one line with the place in the code, for any other exception.
    """
    method = getattr(backend, name, None)
    if not callable(method):
        raise NotImplementedError(f"{name} is not offered")
    try:
        return method(*arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and is_own_refusal(backend, error):
            raise NotImplementedError(str(error) or f"{name} is not offered") from None
        why = " ".join(f"{type(error).__name__}: {error}".split())
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"--against: {name} failed on {purpose}: {why} "
            f"({at.filename}:{at.lineno}); mend it, or raise NotImplementedError in the backend's "
            "own file"
        ) from error


def _run_call(
    backend: Any, config: LlamaConfig, params: Mapping[str, Array], call: Call, cache: Any
) -> tuple[dict[str, Array], Any, str]:
    """Run one call; return the activations or logits, the cache, and which of them are offered."""
    # Copies: a backend that overwrites its inputs must not change the oracle's.
    inputs = (None if x is None else x.copy() for x in (call.tokens, call.positions, call.mask))
    given = (config, params, *inputs)
    purpose = f"the call {call.name!r}"
    if call.after is not None and cache is None:
        return {}, None, "not covered: decoding is not offered"
    try:
        pair = call_backend(backend, "traced_decode", purpose, *given, cache)
        found, cache = _as_pair(pair, "traced_decode")
        return _as_arrays(found, "traced_decode"), cache, "activations"
    except NotImplementedError:
        pass
    logits: dict[str, Array] = {}
    try:
        pair = call_backend(backend, "decode", purpose, *given, cache)
        decoded, cache = _as_pair(pair, "decode")
        logits = _as_arrays({"logits": decoded}, "decode")
    except NotImplementedError as error:
        why, cache = str(error), None
    if call.after is None:
        try:
            found = _as_arrays(call_backend(backend, "trace", purpose, *given), "trace")
            # People run decode: its logits are judged in place of the trace's.
            return found | logits, cache, "activations"
        except NotImplementedError:
            pass
        try:
            if not logits:
                alone = call_backend(backend, "logits", purpose, *given)
                logits = _as_arrays({"logits": alone}, "logits")
        except NotImplementedError as error:
            why = str(error)
    return logits, cache, "logits" if logits else f"not covered: {why}"


def _as_pair(value: Any, name: str) -> tuple[Any, Any]:
    """Return a method's result, checked to be a pair. Raises InputError for any other."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise InputError(f"--against: {name} must return two things, got {type(value).__name__}")
    return value


def _as_arrays(found: Any, name: str) -> dict[str, Array]:
    """Return a method's arrays by name, in float64 where they are and else in float32."""
    try:
        arrays = {key: np.asarray(value) for key, value in dict(found).items()}
        return {k: v if v.dtype == np.float64 else v.astype(np.float32) for k, v in arrays.items()}
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"--against: {name} must return NumPy arrays ({why})") from None
