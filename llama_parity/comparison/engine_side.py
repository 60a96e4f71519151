"""Call a backend's methods; run an engine that owns its cache, by ``start`` and ``append``.

Axes: B batch, T tokens of the call, V vocabulary.
"""

import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from reference_np.backend import Backend
from reference_np.config import InputError, LlamaConfig
from reference_np.ops import Array
from reference_np.refusals import is_own_refusal

from .sides import LAST_LOGITS, NOT_COVERED
from .trace_format import Call


class Engine:
    """An engine's sequences, which continue the call that ran last."""

    def __init__(self, backend: Any, config: LlamaConfig, params: Mapping[str, Array]) -> None:
        self.backend, self.config, self.params = backend, config, params
        self.last_call: int | None = None
        self.called: set[str] = set()  # names of methods
        self.refusal = ""  # why the sequences that run last were not begun or continued
        self.is_offered = all(offers(backend, name) for name in ("start", "append"))

    def run(
        self, call: Call, index: int, found: Mapping[str, Array], covers: str
    ) -> tuple[dict[str, Array], str]:
        """Run a call on the engine; return the outputs with its own, and how much they are.

        ``found``, ``covers``: what the backend's other methods offer. Its logits of the next token
        stand in for the last of theirs: people run the engine.
        """
        found, last_call, self.last_call = dict(found), self.last_call, None
        if call.mask is not None or call.positions is not None:
            if call.after is not None:
                covers = f"{NOT_COVERED}: start and append take neither positions nor a mask"
            return found, covers
        purpose = f"the call {call.name!r}"
        try:
            if call.after is None:
                self.called.add("start")
                rows = list(call.tokens.copy())
                given = call_backend(self.backend, "start", purpose, self.config, self.params, rows)
            elif call.after == last_call:
                self.called.add("append")
                given = call_backend(self.backend, "append", purpose, call.tokens.copy())
            else:
                return found, f"{NOT_COVERED}: {self.refusal}" if self.refusal else covers
        except NotImplementedError as error:
            self.refusal = str(error)
            return found, covers if found else f"{NOT_COVERED}: {error}"
        self.last_call, self.refusal = index, ""
        last = as_arrays({"logits": given}, "start and append")["logits"]
        shape = (len(call.tokens), self.config.vocab_size)
        if last.shape != shape:
            raise InputError(
                f"--against: start and append must return logits [B, V] of {list(shape)} on "
                f"{purpose}, got {list(last.shape)}"
            )
        width = call.tokens.shape[1]
        whole = (*call.tokens.shape, self.config.vocab_size)
        if "logits" not in found:
            logits = np.zeros(whole, last.dtype)
            covers = "logits" if width == 1 else LAST_LOGITS
        elif found["logits"].shape != whole:
            return found, covers  # which fails
        else:
            logits = found["logits"].astype(np.result_type(found["logits"], last))
        logits[:, -1] = last
        return found | {"logits": logits}, covers


def offers(backend: Any, name: str) -> bool:
    """Return whether a backend has a method, not that of ``Backend``, which raises."""
    method = getattr(backend, name, None)
    return callable(method) and getattr(method, "__func__", None) is not getattr(Backend, name)


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


def as_arrays(found: Any, name: str) -> dict[str, Array]:
    """Return a method's arrays by name, in float64 where they are and else in float32."""
    try:
        arrays = {key: np.asarray(value) for key, value in dict(found).items()}
        return {k: v if v.dtype == np.float64 else v.astype(np.float32) for k, v in arrays.items()}
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"--against: {name} must return NumPy arrays ({why})") from None
