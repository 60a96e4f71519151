"""The oracle over many calls, one stage at a time: embedding, each layer, head.

A stage's parameters are read when it runs and dropped after it, so a checkpoint of any size
takes the memory of one layer. Running free, a stage continues from the stage before. Forced, it
is fed what another implementation computed, operation by operation: what it returns is then what
each operation makes of the other side's own input, and an error there is that operation's own.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reference_np import ops as reference_ops
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.low_precision import round_to
from reference_np.model import Ops, block, defaults, head, layer_params
from reference_np.naming import EMBED, LAYER_AXES
from reference_np.ops import Array
from reference_np.tolerances import FACTOR, UNIT_ROUNDOFF, attention_bound

from .axes import Order, as_declared, find_order
from .trace_file import Call, cached

# An activation: the index of its call and its name.
Key = tuple[int, str]
Activations = Mapping[Key, Array]
Past = tuple[()] | tuple[Array, Array]  # a layer's cached keys and values, if any
Used = dict[str, Array]  # the activations of a layer, as the rest of it reads them


def stage_names(config: LlamaConfig, stage: int) -> list[str]:
    """Return the activations of a stage: -1 is the embedding, n_layers the head."""
    if stage == -1:
        return ["embed"]
    if stage == config.n_layers:
        return ["norm", "logits"]
    return [f"layers.{stage}.{name}" for name in LAYER_AXES]


def stream_before(stage: int) -> str:
    """Name the residual stream that enters a stage; the embedding has none."""
    return "" if stage == -1 else "embed" if stage == 0 else f"layers.{stage - 1}.residual"


def usable(value: Array | None, shape: tuple[int, ...]) -> bool:
    """Return whether an activation of the other side can be computed with."""
    return value is not None and value.shape == shape and bool(np.isfinite(value).all())


class Weights(Mapping[str, Array]):
    """A checkpoint's parameters rounded to the precision under test, in ``dtype``.

    The first that are asked for are kept, up to ``keep`` bytes of them.
    """

    def __init__(
        self, path: Path, precision: str, dtype: str, moved: int = 0, keep: int = 0
    ) -> None:
        self.checkpoint = Checkpoint(path, "float64" if precision == "float64" else "float32")
        self.precision, self.dtype, self.moved = precision, dtype, moved
        self._kept: dict[str, Array] = {}
        self._room = keep

    def __getitem__(self, name: str) -> Array:
        if name in self._kept:
            return self._kept[name]
        value = self._read(name)
        if value.nbytes <= self._room:
            self._kept[name] = value
            self._room -= value.nbytes
        return value

    def keeping(self, n_bytes: int) -> "Weights":
        """Return the same parameters, of which so many bytes are read once."""
        return Weights(self.checkpoint.path, self.precision, self.dtype, self.moved, n_bytes)

    def _read(self, name: str) -> Array:
        value = self.checkpoint[name]
        if self.moved:  # by one rounding up or down, the same way at every reading
            signs = _signs(value.shape, zlib.crc32(name.encode()), self.moved)
            value = value * (1 + 2 * UNIT_ROUNDOFF[self.precision] * signs).astype(value.dtype)
        if self.precision in ("bfloat16", "float16"):
            value = round_to(value, self.precision)
        return value.astype(self.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)


def _signs(shape: tuple[int, ...], *seed: int) -> Array:
    """Draw 1 or -1 for every element, in float32."""
    drawn = np.random.default_rng(seed).integers(0, 2, shape, dtype=np.int8)
    signs: Array = 2 * drawn.astype(np.float32) - 1
    return signs


class _Once(dict[str, Array]):
    """Parameters read when first asked for, and then kept: for the time that a stage runs."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        super().__init__()
        self._params = params

    def __missing__(self, name: str) -> Array:
        self[name] = self._params[name]
        return self[name]


class Replay:
    """One variant of the oracle: its operations, its dtype, and where each call stands."""

    def __init__(
        self,
        config: LlamaConfig,
        calls: Sequence[Call],
        params: Weights,
        ops: Ops = reference_ops,
        watches: bool = False,
        trusts: bool = False,
    ) -> None:
        self.config, self.calls, self.params, self.ops = config, calls, params, ops
        self.trusts = trusts  # the other side's activations are known to be finite
        self.watches = watches  # bounds attention's error, and finds what is in another order
        self.allowed: dict[Key, Array] = {}  # by attention's bound, in the stage last run
        self.orders: dict[Key, Order] = {}  # of the other side's axes
        self.streams: dict[int, Array] = {}
        self.stage = -2  # the last one run
        self.given = []
        for c, call in enumerate(calls):
            start = cached(calls, c)
            positions, mask = defaults(call.tokens, call.positions, call.mask, start, config, ops)
            tables = ops.rope_tables(positions, config, params.dtype)
            self.given.append((tables, mask))

    def _is_usable(self, value: Array | None, shape: tuple[int, ...]) -> bool:
        if self.trusts:
            return value is not None and value.shape == shape
        return usable(value, shape)

    def begin(self, call: int, stream: Array | None) -> bool:
        """Let a call continue from a residual stream, if that can be computed with."""
        fits = self._is_usable(stream, (*self.calls[call].tokens.shape, self.config.dim))
        if stream is not None and fits:
            self.streams[call] = stream.astype(self.params.dtype)
        return fits

    def run(self, stage: int, theirs: Activations | None = None) -> dict[Key, Array]:
        """Run a stage of every call that has come this far; ``theirs`` forces it.

        Return its activations. With moved parameters attention moves too, as far as it may err.
        """
        found: dict[Key, Array] = {}
        self.allowed.clear()
        inside = 0 <= stage < self.config.n_layers
        params = _Once(self.params)
        layer = layer_params(params, stage, self.config, self.ops) if inside else {}
        presents: dict[int, tuple[Array, Array]] = {}
        for c, call in enumerate(self.calls):
            past = presents.get(call.after, ()) if call.after is not None else ()
            used: dict[str, Array] = {}

            def note(
                kind: str, value: Array, c: int = c, past: Past = past, used: Used = used
            ) -> None:
                name = f"layers.{stage}.{kind}" if inside else kind
                used[kind] = value
                if kind == "attn" and (self.watches or self.params.moved):
                    self.allowed[c, name] = self._bound(c, used, past)
                    if self.params.moved:
                        signs = _signs(value.shape, stage, c, self.params.moved)
                        value += signs * self.allowed[c, name] / FACTOR
                found[c, name] = value if theirs is None else value.copy()
                given = None if theirs is None else theirs.get((c, name))
                if given is not None and self._is_usable(given, value.shape):
                    if self.watches and (order := find_order(given, value)):
                        self.orders[c, name] = order
                        given = as_declared(given, order)
                    value[...] = given

            begun = theirs is not None and self.begin(c, theirs.get((c, stream_before(stage))))
            if not begun and self.stage not in (-2, stage - 1):
                self.streams.pop(c, None)  # what is there is of some earlier stage
            ready = call.after is None or call.after in presents or not inside
            if stage >= 0 and not (c in self.streams and ready):
                continue
            if stage == -1:
                weight = self.ops.read(params, EMBED, self.config)
                self.streams[c] = self.ops.embed(weight, call.tokens)
                note("embed", self.streams[c])
            elif stage == self.config.n_layers:
                head(params, self.streams[c], self.config, note, self.ops)
            else:
                tables, mask = self.given[c]
                self.streams[c], presents[c] = block(
                    layer, self.streams[c], self.config, tables, mask, past or None, note, self.ops
                )
        self.stage = stage
        return found

    def _bound(self, c: int, used: Used, past: Past) -> Array:
        """Bound attention's error in a call [B, T, H, K], from what it was computed from."""
        k_BNSK, v_BNSK = used["k_rope"].swapaxes(1, 2), used["v"].swapaxes(1, 2)
        if past:
            k_BNSK, v_BNSK = self.ops.extend(past[0], k_BNSK), self.ops.extend(past[1], v_BNSK)
        mask = self.given[c][1]
        return attention_bound(used["q_rope"], k_BNSK, v_BNSK, mask, self.params.precision)
