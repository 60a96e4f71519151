"""A backend's methods, their results checked before they are compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig

from .description import describe_call, describe_config


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


# The config and the call of the example that runs, for the report of a failure.
last_call: list[str] = []


def as_array(name: str, value: Any) -> Array:
    """Return a result as a NumPy array of floats; ParityError for anything else."""
    kind = type(value)
    if kind.__module__.partition(".")[0] == "torch":
        raise ParityError(
            f"{name} is a torch tensor: return a NumPy array (x.detach().float().cpu().numpy(), "
            "or double() for float64)"
        )
    try:
        array = np.asarray(value)
        if array.dtype.kind in "fV":  # "V": bfloat16 of ml_dtypes
            return array if array.dtype.kind == "f" else array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ParityError(f"{name} is no array: {' '.join(str(error).split())}") from None
    raise ParityError(f"{name} is of type {kind.__name__} and dtype {array.dtype}: return floats")


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
        raise ParityError(f"{method} returned {type(result).__name__}, not a tuple of two")
    return result


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ParityError(f"{name} is of type {type(value).__name__}, not a mapping from names")
    return dict(value)


class Calls:
    """Calls a backend's methods and checks what they return; notes the call for a report.

    A method that the backend lacks raises NotImplementedError.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def _call(self, method: str, config: LlamaConfig, params: Params, *arguments: Any) -> Any:
        last_call[:] = [describe_config(config), describe_call(method, arguments)]
        return self._method(method)(config, params, *arguments)

    def _method(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name, None)
        if not callable(method):
            raise NotImplementedError(f"{name} is not offered")
        return method

    def _checked(self, value: Any, shape: tuple[int, ...], axes: str) -> Array:
        logits = as_array("logits", value)
        if why := unfit("logits", logits, shape):
            raise ParityError(f"{why}{f' {axes}' if logits.shape != shape else ''}")
        return logits

    def logits(self, config: LlamaConfig, params: Params, *inputs: Any) -> Array:
        value = self._call("logits", config, params, *inputs)
        return self._checked(value, (*inputs[0].shape, config.vocab_size), "[B, T, V]")

    def decode(self, config: LlamaConfig, params: Params, *inputs: Any) -> tuple[Array, Any]:
        value, cache = _pair("decode", self._call("decode", config, params, *inputs))
        return self._checked(value, (*inputs[0].shape, config.vocab_size), "[B, T, V]"), cache

    def directory_logits(
        self, config: LlamaConfig, form: str, path: str, dtype: str, tokens: Array
    ) -> Array:
        """Return the logits of tokens [B, T] by a directory of ``config``, written in ``form``."""
        last_call[:] = [describe_config(config), f"from_directory: {form}; {dtype}; tokens "]
        last_call[1] += str(list(tokens.shape))
        value = self._method("from_directory")(path, dtype)(tokens)
        return self._checked(value, (*tokens.shape, config.vocab_size), "[B, T, V]")

    def trace(self, config: LlamaConfig, params: Params, *inputs: Any) -> dict[str, Any]:
        return _mapping("trace's result", self._call("trace", config, params, *inputs))

    def traced_decode(
        self, config: LlamaConfig, params: Params, *inputs: Any
    ) -> tuple[dict[str, Any], Any]:
        found, cache = _pair("traced_decode", self._call("traced_decode", config, params, *inputs))
        return _mapping("traced_decode's first result", found), cache

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, *inputs: Any
    ) -> tuple[Any, dict[str, Any]]:
        result = self._call("loss_and_grads", config, params, *inputs)
        loss, grads = _pair("loss_and_grads", result)
        return loss, _parameters("gradient", _mapping("the gradients", grads), params)

    def train(self, config: LlamaConfig, params: Params, *inputs: Any) -> dict[str, Any]:
        found = _mapping("train's result", self._call("train", config, params, *inputs))
        if absent := {"loss", "grad_norm", "params", "exp_avg", "exp_avg_sq"} - set(found):
            raise ParityError(f"train's result lacks {', '.join(sorted(absent))}")
        for name in ("params", "exp_avg", "exp_avg_sq"):
            found[name] = _parameters(name, _mapping(name, found[name]), params)
        return found

    def start(self, config: LlamaConfig, params: Params, rows: Sequence[Array]) -> Array:
        value = self._call("start", config, params, rows)
        self._shape = (len(rows), config.vocab_size)
        return self._checked(value, self._shape, "[B, V]")

    def append(self, tokens: Array) -> Array:
        last_call[1:] = [describe_call("append", (tokens,))]
        return self._checked(self._method("append")(tokens), self._shape, "[B, V]")


def _parameters(name: str, values: dict[str, Any], params: Params) -> dict[str, Array]:
    """Return one array for each parameter, of its shape; ParityError where one is missing."""
    found = {}
    for key, parameter in params.items():
        if key not in values:
            raise ParityError(f"{name} of {key} is missing")
        found[key] = as_array(f"{name} of {key}", values[key])
        if why := unfit(f"{name} of {key}", found[key], parameter.shape):
            raise ParityError(why)
    return found
