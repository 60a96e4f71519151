"""Ports that write to the arrays and files they are given, honest ones and ones with a bug."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference_np import grad, ops, optim
from reference_np.limits import Limits
from reference_np.mutants import FORWARD
from reference_np.ops import Array
from reference_np.training_mutants import TRAINING

from ..conformance.oracle import Oracle
from .toy_loaders import FixedEpsilon

MUTANTS = {mutant.name: mutant for mutant in (*FORWARD, *TRAINING)}
METHODS = ("logits", "decode", "trace", "traced_decode", "start", "loss_and_grads", "train")


def overwrite(value: Any) -> None:
    """Write zeros to every array of a call's arguments."""
    if isinstance(value, np.ndarray):
        value[...] = 0
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            overwrite(part)


class Overwriting:
    """The oracle in float32 with one known bug, which zeroes what it is given once it has read it.

    As one does that frees memory, or whose buffers are the caller's arrays.
    """

    dtypes = ("float32",)
    bug = ""

    def __init__(self) -> None:
        parts = (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES)
        inner = Oracle(*(MUTANTS[self.bug].apply(part) for part in parts if self.bug))
        self.append = inner.append
        for name in METHODS:
            setattr(self, name, self._overwriting(getattr(inner, name)))

    logits: Callable[..., Any]  # and all of METHODS

    def _overwriting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(config: Any, params: Any, *arguments: Any) -> Any:
            result = method(config, copy.deepcopy(params), *copy.deepcopy(arguments))
            overwrite(params)
            overwrite(arguments[:3])  # the fourth one of decode is the cache, its own
            return result

        return run


class TiledHeads(Overwriting):
    """Key heads repeated in the wrong order."""

    bug = "kv_heads_tiled"


class DecodingOneLate(Overwriting):
    """Decoding from one position too far."""

    bug = "positions_one_more"


class KeysOfTheFirstHead(Overwriting):
    """A shared key's gradient from one of its query heads."""

    bug = "keys_from_first_head"


class DecayOnNorms(Overwriting):
    """Weight decay on norm weights."""

    bug = "decay_on_norms"


class TiledHeadsAndDeclaredAngles(TiledHeads):
    """The same bug in float64, in a port that declares float32 angles."""

    dtypes = ("float64",)
    limits = Limits(float32_angles=("float64",))


class ConfigRewritten(FixedEpsilon):
    """A loader that does not read epsilon, and leaves another config.json behind."""

    dtypes = ("float32",)

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        run = super().from_directory(path, dtype)
        file = Path(path) / "config.json"
        written = json.loads(file.read_text())
        file.write_text(json.dumps(written | {"rms_norm_eps": 1e3}))
        return run


class QueriesScaled(Oracle):
    """An honest port, which multiplies the query matrices by 1 / sqrt(head_dim) where they lie."""

    dtypes = ("float32",)

    def decode(self, config: Any, params: Any, *rest: Any) -> Any:
        for name, value in params.items():
            if "q_proj" in name:
                value *= config.head_dim**-0.5
        unscaled = {
            name: value * np.float32(config.head_dim**0.5) if "q_proj" in name else value
            for name, value in params.items()
        }
        return super().decode(config, unscaled, *rest)


class BufferKept(Oracle):
    """An honest port, which returns the logits of all calls of one shape in the same array."""

    dtypes = ("float64",)

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[tuple[int, ...], Array] = {}

    def decode(self, *arguments: Any) -> Any:
        logits, cache = super().decode(*arguments)
        buffer = self._buffers.setdefault(logits.shape, logits)
        buffer[...] = logits
        return buffer, cache
