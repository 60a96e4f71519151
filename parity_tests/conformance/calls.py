"""A backend's methods, their results checked before they are compared."""

import shutil
import tempfile
import traceback
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from .description import describe_call, describe_config
from .handed import OVERWRITES, Handed, describe_change

Inputs = Mapping[str, Any]  # by name: arrays, or sequences of them


class ParityError(AssertionError):
    """A result that does not hold: the sentence, lines of detail, and what it equals.

    ``resembling`` returns the known bugs with the same result; it is called for the report alone.
    """

    def __init__(
        self,
        sentence: str,
        details: Sequence[str] = (),
        resembling: Callable[[], list[str]] = list,
    ) -> None:
        super().__init__(sentence)
        self.sentence, self.details, self.resembling = sentence, details, resembling


TERMINATED = 143  # the exit code that llama-parity raises itself, on SIGTERM


@contextmanager
def no_exit(method: str) -> Iterator[None]:
    """Raise ParityError where a backend's method would end the process or skip the check."""
    try:
        yield
    except (unittest.SkipTest, pytest.skip.Exception) as error:
        raise ParityError(
            f"{method} skips the check ({error}): raise NotImplementedError with the reason for "
            "what it does not offer"
        ) from error
    except SystemExit as error:
        if error.code == TERMINATED:
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ParityError(
            f"{method} raised {error!r}, which ends the process, at {at.filename}:{at.lineno}: "
            "raise another error"
        ) from error


class WrongKindError(ParityError):
    """A result of a wrong type, as it is on any example: no smaller one is searched for."""


# The config and the call of the example that runs, for the report of a failure.
last_call: list[str] = []


def as_array(name: str, value: Any) -> Array:
    """Return a result as a NumPy array of floats; ParityError for anything else."""
    kind = type(value)
    if kind.__module__.partition(".")[0] == "torch":
        raise WrongKindError(
            f"{name} is a torch tensor: return a NumPy array (x.detach().float().cpu().numpy(), "
            "or double() for float64)"
        )
    try:
        array = np.asarray(value)
        if array.dtype.kind in "fV":  # "V": bfloat16 of ml_dtypes
            return array if array.dtype.kind == "f" else array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise WrongKindError(f"{name} is no array: {' '.join(str(error).split())}") from None
    raise WrongKindError(
        f"{name} is of type {kind.__name__} and dtype {array.dtype}: return floats"
    )


def unfit(name: str, value: Array, shape: tuple[int, ...]) -> str:
    """Return why an array cannot be compared, its shape or a value that is not finite; or ""."""
    if value.shape != shape:
        return f"{name} has the shape {list(value.shape)}, not {list(shape)}"
    bad = ~np.isfinite(value)
    if not bad.any():
        return ""
    first = [int(i) for i in np.argwhere(bad)[0]]
    kind = "NaN" if np.isnan(value[bad]).any() else "infinite"
    return f"{name}: {int(bad.sum())} of {value.size} values are {kind}, the first at {first}"


def _pair(method: str, result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise WrongKindError(f"{method} returned {type(result).__name__}, not a tuple of two")
    return result


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping with copies of its arrays, to which a later call may write."""
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise WrongKindError(f"{name} must be a mapping from names to arrays, got {kind}")
    return {key: v.copy() if isinstance(v, np.ndarray) else v for key, v in value.items()}


class Calls:
    """Calls a backend's methods and checks what they return; notes the call for a report.

    It is handed copies. ``overwritten`` has a sentence on what it wrote to of what it was given, or
    had returned before. A method that the backend lacks raises NotImplementedError.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.overwritten = ""
        self._params: tuple[Params, Handed] | None = None
        self._returned: list[tuple[str, Array, Array]] = []

    def _call(
        self, method: str, config: LlamaConfig, params: Params, inputs: Inputs, *rest: Any
    ) -> Any:
        """Call a method with config, params and named arrays; ``rest`` is passed on as it is."""
        last_call[:] = [describe_config(config), describe_call(method, (*inputs.values(), *rest))]
        # The same copy for all calls of a scenario: a backend may know its weights by it.
        if self._params is None or self._params[0] is not params:
            self._params = params, Handed(params)
        handed = Handed(inputs)
        given = self._params[1].copies, *handed.copies.values(), *rest
        function = self._method(method)
        with no_exit(method):
            result = function(config, *given)
        self._note_changes(method, handed)
        return result

    def _note_changes(self, method: str, handed: Handed) -> None:
        """Note the first change of what was given to a method, or returned by one before."""
        changed = handed.changed()
        if self._params is not None and (of_params := self._params[1].changed()):
            changed = of_params + changed
            self._params = None
        found = describe_change(method, changed) if changed else ""
        for name, array, copy in self._returned:
            if not found and not np.array_equal(array, copy, equal_nan=True):
                found = f"{method} changes what {name} returned before: {OVERWRITES[1]}"
        self.overwritten = self.overwritten or found

    def _method(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name, None)
        if not callable(method):
            raise NotImplementedError(f"{name} is not offered")
        return method

    def _checked(self, method: str, value: Any, shape: tuple[int, ...], axes: str) -> Array:
        """Return checked logits; a copy, as a later call may write to the same array."""
        logits = as_array("logits", value)
        if why := unfit("logits", logits, shape):
            raise ParityError(f"{why}{f' {axes}' if logits.shape != shape else ''}")
        self._returned.append((method, logits, logits.copy()))
        return self._returned[-1][-1]

    def logits(self, config: LlamaConfig, params: Params, *inputs: Any) -> Array:
        value = self._call("logits", config, params, _named(inputs))
        return self._checked("logits", value, (*inputs[0].shape, config.vocab_size), "[B, T, V]")

    def decode(
        self, config: LlamaConfig, params: Params, *inputs_and_cache: Any
    ) -> tuple[Array, Any]:
        *inputs, cache = inputs_and_cache
        value, cache = _pair("decode", self._call("decode", config, params, _named(inputs), cache))
        shape = (*inputs[0].shape, config.vocab_size)
        return self._checked("decode", value, shape, "[B, T, V]"), cache

    def directory_logits(
        self, config: LlamaConfig, form: str, path: str, dtype: str, tokens: Array
    ) -> Array:
        """Return the logits of tokens [B, T] by a directory of ``config``, written in ``form``.

        The backend reads a copy of the directory, to which it may write.
        """
        last_call[:] = [describe_config(config), f"from_directory: {form}; {dtype}; tokens "]
        last_call[1] += str(list(tokens.shape))
        method, handed = self._method("from_directory"), Handed({"tokens": tokens})
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(path, folder, dirs_exist_ok=True)
            with no_exit("from_directory"):
                run = method(folder, dtype)
                if not callable(run):
                    raise WrongKindError(
                        f"from_directory returned {type(run).__name__}: return a function from "
                        "tokens [B, T] to logits [B, T, V]"
                    )
                value = run(handed.copies["tokens"])
        self._note_changes("from_directory", handed)
        shape = (*tokens.shape, config.vocab_size)
        return self._checked("from_directory", value, shape, "[B, T, V]")

    def trace(self, config: LlamaConfig, params: Params, *inputs: Any) -> dict[str, Any]:
        return _mapping("trace's result", self._call("trace", config, params, _named(inputs)))

    def traced_decode(
        self, config: LlamaConfig, params: Params, *inputs_and_cache: Any
    ) -> tuple[dict[str, Any], Any]:
        *inputs, cache = inputs_and_cache
        result = self._call("traced_decode", config, params, _named(inputs), cache)
        found, cache = _pair("traced_decode", result)
        return _mapping("traced_decode's first result", found), cache

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[Any, dict[str, Any]]:
        result = self._call("loss_and_grads", config, params, {"batches": batches}, z_loss)
        loss, grads = _pair("loss_and_grads", result)
        return loss, checked_parameters("gradient", _mapping("the gradients", grads), params)

    def train(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], *rest: Any
    ) -> dict[str, Any]:
        result = self._call("train", config, params, {"batches": batches}, *rest)
        found = _mapping("train's result", result)
        if absent := {"loss", "grad_norm", "params", "exp_avg", "exp_avg_sq"} - set(found):
            raise ParityError(f"train's result lacks {', '.join(sorted(absent))}")
        for name in ("params", "exp_avg", "exp_avg_sq"):
            found[name] = checked_parameters(name, _mapping(name, found[name]), params)
        return found

    def start(self, config: LlamaConfig, params: Params, rows: Sequence[Array]) -> Array:
        value = self._call("start", config, params, {"rows": rows})
        self._shape = (len(rows), config.vocab_size)
        return self._checked("start", value, self._shape, "[B, V]")

    def append(self, tokens: Array) -> Array:
        last_call[1:] = [describe_call("append", (tokens,))]
        handed = Handed({"tokens": tokens})
        method = self._method("append")
        with no_exit("append"):
            value = method(handed.copies["tokens"])
        self._note_changes("append", handed)
        return self._checked("append", value, self._shape, "[B, V]")


def _named(inputs: Sequence[Any]) -> Inputs:
    """Return tokens, positions and mask by name."""
    return dict(zip(("tokens", "positions", "mask"), inputs, strict=True))


def checked_parameters(name: str, values: dict[str, Any], params: Params) -> dict[str, Array]:
    """Return one array for each parameter, of its shape; ParityError where one is missing."""
    found = {}
    for key, parameter in params.items():
        if key not in values:
            raise ParityError(f"{name} of {key} is missing")
        found[key] = as_array(f"{name} of {key}", values[key])
        if why := unfit(f"{name} of {key}", found[key], parameter.shape):
            raise ParityError(why)
    return found
