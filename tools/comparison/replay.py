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
from reference_np.model import Ops, Trace, block, defaults, head, layer_params
from reference_np.naming import EMBED, LAYER_AXES
from reference_np.ops import Array
from reference_np.tolerances import FACTOR, UNIT_ROUNDOFF, attention_bound, one_by_one

from .axes import Order, as_declared, find_order
from .trace_file import Call, cached

# An activation: the index of its call and its name.
Key = tuple[int, str]
Activations = Mapping[Key, Array]
Past = tuple[()] | tuple[Array, Array]  # a layer's cached keys and values, if any
Inputs = tuple[tuple[Array, Array], Array]  # a call's RoPE tables [B, T, K / 2] and mask [B, T, S]
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


def n_terms(config: LlamaConfig, kind: str) -> int:
    """Return how many terms each element of an activation is a sum of; 0 where it is none.

    Attention's sums have a bound of their own, ``attention_bound``.
    """
    if kind in ("attn_norm", "ffn_norm", "norm", "q", "k", "v", "gate", "up", "logits"):
        return config.dim
    widths = {"attn_proj": config.n_heads * config.head_dim, "ffn_proj": config.hidden_dim}
    return widths.get(kind, 0)


def finite(theirs: Activations) -> dict[Key, Array]:
    """Return the activations that can be computed with: those without a NaN or an infinity."""
    return {key: value for key, value in theirs.items() if np.isfinite(value).all()}


def inputs(config: LlamaConfig, calls: Sequence[Call], dtype: str, ops: Ops) -> list[Inputs]:
    """Compute every call's RoPE tables and its mask, from which all layers read."""
    found = []
    for c, call in enumerate(calls):
        start = cached(calls, c)
        positions, mask = defaults(call.tokens, call.positions, call.mask, start, config, ops)
        found.append((ops.rope_tables(positions, config, dtype), mask))
    return found


class Weights(Mapping[str, Array]):
    """A checkpoint's parameters rounded to the precision under test, in ``dtype``."""

    def __init__(self, path: Path, precision: str, dtype: str, moved: int = 0) -> None:
        self.checkpoint = Checkpoint(path, "float64" if precision == "float64" else "float32")
        self.precision, self.dtype, self.moved = precision, dtype, moved

    def __getitem__(self, name: str) -> Array:
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


class Once(dict[str, Array]):
    """Parameters read when first asked for, and then kept: for the time that a stage runs."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        super().__init__()
        self._params = params

    def __missing__(self, name: str) -> Array:
        self[name] = self._params[name]
        return self[name]


class Replay:
    """One variant of the oracle: its operations, its dtype, and where each call stands.

    ``given`` holds what ``inputs`` computes, where that was done before.
    """

    def __init__(
        self,
        config: LlamaConfig,
        calls: Sequence[Call],
        params: Weights,
        ops: Ops = reference_ops,
        watches: bool = False,
        given: Sequence[Inputs] | None = None,
    ) -> None:
        self.config, self.calls, self.params, self.ops = config, calls, params, ops
        self.watches = watches  # bounds attention's error, and finds what is in another order
        self.allowed: dict[Key, Array] = {}  # by attention's bound, in the stage last run
        self.orders: dict[Key, Order] = {}  # of the other side's axes
        self.streams: dict[int, Array] = {}
        self.stage = -2  # the last one run
        self.given = inputs(config, calls, params.dtype, ops) if given is None else given

    def begin(self, call: int, stream: Array | None) -> bool:
        """Let a call continue from a finite residual stream, if it has the right shape."""
        shape = (*self.calls[call].tokens.shape, self.config.dim)
        if stream is None or stream.shape != shape:
            return False
        self.streams[call] = stream.astype(self.params.dtype)
        return True

    def follow(self, other: "Replay") -> None:
        """Stand where another replay of the same calls stands."""
        self.streams, self.stage = dict(other.streams), other.stage

    def run(
        self,
        stage: int,
        theirs: Activations | None = None,
        params: Mapping[str, Array] | None = None,
    ) -> dict[Key, Array]:
        """Run a stage of every call that has come this far; ``theirs``, all finite, forces it.

        Return its activations. With moved parameters attention moves too, as far as it may err.
        ``params`` are the stage's parameters where they were read before.
        """
        found: dict[Key, Array] = {}
        self.allowed.clear()
        inside = 0 <= stage < self.config.n_layers
        params = Once(self.params) if params is None else params
        layer = layer_params(params, stage, self.config, self.ops) if inside else {}
        presents: dict[int, tuple[Array, Array]] = {}
        for c, call in enumerate(self.calls):
            begun = theirs is not None and self.begin(c, theirs.get((c, stream_before(stage))))
            if not begun and self.stage not in (-2, stage - 1):
                self.streams.pop(c, None)  # what is there is of some earlier stage
            ready = call.after is None or call.after in presents or not inside
            if stage >= 0 and not (c in self.streams and ready):
                continue
            past = presents.get(call.after, ()) if call.after is not None else ()
            note = self._noting(stage, c, past, theirs, found)
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

    def _noting(
        self, stage: int, c: int, past: Past, theirs: Activations | None, found: dict[Key, Array]
    ) -> Trace:
        """Return what puts a call's activations of a stage into ``found`` and forces them."""
        prefix = f"layers.{stage}." if 0 <= stage < self.config.n_layers else ""
        bounds = self.watches or self.params.moved
        used: Used = {}

        def note(kind: str, value: Array) -> None:
            key = (c, prefix + kind)
            used[kind] = value
            if kind == "attn" and bounds:
                self.allowed[key] = self._bound(c, used, past)
                if self.params.moved:
                    signs = _signs(value.shape, stage, c, self.params.moved)
                    value += signs * self.allowed[key] / FACTOR
            elif self.params.moved and (n := n_terms(self.config, kind)):
                signs = _signs(value.shape, zlib.crc32(key[1].encode()), c, self.params.moved)
                size = np.sqrt(np.mean(value**2, axis=-1, keepdims=True))
                value += signs * (one_by_one(n, self.params.precision) * size)
            if theirs is None:
                found[key] = value
                return
            found[key] = value.copy()
            given = theirs.get(key)
            if given is not None and given.shape == value.shape:
                if self.watches and (order := find_order(given, value)):
                    self.orders[key] = order
                    given = as_declared(given, order)
                value[...] = given

        return note

    def _bound(self, c: int, used: Used, past: Past) -> Array:
        """Bound attention's error in a call [B, T, H, K], from what it was computed from."""
        k_BNSK, v_BNSK = used["k_rope"].swapaxes(1, 2), used["v"].swapaxes(1, 2)
        if past:
            k_BNSK, v_BNSK = self.ops.extend(past[0], k_BNSK), self.ops.extend(past[1], v_BNSK)
        mask = self.given[c][1]
        return attention_bound(used["q_rope"], k_BNSK, v_BNSK, mask, self.params.precision)
