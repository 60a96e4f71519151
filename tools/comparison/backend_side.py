"""Record what a backend of the suite's protocol computes."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from reference_np import backend as backends
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError, LlamaConfig
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.ops import Array

from .sides import Advance, Side
from .trace_file import Call, TraceWriter

# Anything behind the suite's protocol.


class Parameters(Mapping[str, Array]):
    """The parameters of the first layers, in the precision under test, read when asked for.

    Every time anew: what somebody does to one reaches nobody else.
    """

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, dtype: str) -> None:
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


def _backend(spec: str, dtype: str, checkpoint: Checkpoint) -> Side:
    backend = backends.load(spec, "--against")
    known = backends.dtypes_of(backend)
    dtype = dtype or ("float32" if "float32" in known else known[0])
    if dtype not in known:
        raise InputError(
            f"--dtype {dtype}: {spec} computes in {', '.join(known)}; give one of them"
        )

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        params = Parameters(checkpoint, config, dtype)
        caches: list[Any] = []
        coverage: list[str] = []
        for index, call in enumerate(calls):
            cache = None if call.after is None else caches[call.after]
            found, cache, covers = _ask(backend, config, params, call, cache)
            caches.append(cache)
            coverage.append(covers)
            for name in activation_axes(config):
                if name in found:
                    writer.add(index, name, found[name])
            for _ in range(config.n_layers):
                advance()
        return coverage

    return Side(spec, dtype, write, backend=spec)


def ask(backend: Any, name: str, what: str, *arguments: Any) -> Any:
    """Call a method of a backend; its own exceptions become one line with their place.

    Raises NotImplementedError where the method is missing or says so.
    """
    method = getattr(backend, name, None)
    if not callable(method):
        raise NotImplementedError(f"{name} is not offered")
    try:
        return method(*arguments)
    except NotImplementedError as error:
        raise NotImplementedError(str(error) or f"{name} is not offered") from None
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"--against: {name} failed on {what}: {why} "
            f"({at.filename}:{at.lineno}); mend it or raise NotImplementedError"
        ) from error


def _ask(
    backend: Any, config: LlamaConfig, params: Mapping[str, Array], call: Call, cache: Any
) -> tuple[dict[str, Array], Any, str]:
    """Get as much of one call as the backend offers: activations, cache, what that covers."""
    # Copies: what a backend does to its inputs must not reach the oracle.
    inputs = (None if x is None else x.copy() for x in (call.tokens, call.positions, call.mask))
    given = (config, params, *inputs)
    what = f"the call {call.name!r}"
    if call.after is not None and cache is None:
        return {}, None, "not covered: decoding is not offered"
    try:
        found, cache = _pair(ask(backend, "traced_decode", what, *given, cache), "traced_decode")
        return _arrays(found, "traced_decode"), cache, "activations"
    except NotImplementedError:
        pass
    logits: dict[str, Array] = {}
    try:
        decoded, cache = _pair(ask(backend, "decode", what, *given, cache), "decode")
        logits = _arrays({"logits": decoded}, "decode")
    except NotImplementedError as error:
        why, cache = str(error), None
    if call.after is None:
        try:
            # What people run is decode: its logits are the ones to judge.
            found = _arrays(ask(backend, "trace", what, *given), "trace")
            return found | logits, cache, "activations"
        except NotImplementedError:
            pass
        try:
            logits = logits or _arrays({"logits": ask(backend, "logits", what, *given)}, "logits")
        except NotImplementedError as error:
            why = str(error)
    return logits, cache, "logits" if logits else f"not covered: {why}"


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InputError(f"--against: {name} must return two things, got {type(value).__name__}")
    return value


def _arrays(found: Any, name: str) -> dict[str, Array]:
    """Widen what a backend returned to float32, or keep it in float64."""
    try:
        arrays = {key: np.asarray(value) for key, value in dict(found).items()}
        return {k: v if v.dtype == np.float64 else v.astype(np.float32) for k, v in arrays.items()}
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"--against: {name} must return NumPy arrays ({why})") from None
