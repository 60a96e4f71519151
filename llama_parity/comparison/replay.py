"""Run the oracle on many calls, one stage at a time: the embedding, each layer, the head.

A stage's parameters are read when it runs and dropped after it, so that a checkpoint of any size
needs the memory of one layer. Free-running, a stage continues from the stage before it.
Teacher-forced, every operation gets the other side's activations as its input, and what a stage
returns is each operation's own output: an error there is that operation's. For this, each array
that the oracle reports to its trace callback is overwritten in place.

Axes: B batch, T tokens of the call, S cached + T, N key-value heads, H heads, K head size.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reference_np import ops as reference_ops
from reference_np.config import LlamaConfig
from reference_np.low_precision import round_to
from reference_np.model import Ops, block, fill_and_check_inputs, head, layer_params
from reference_np.model import Trace as TraceCallback
from reference_np.naming import EMBED, LAYER_AXES
from reference_np.ops import Array
from reference_np.tolerances import (
    BASELINE_FACTOR,
    UNIT_ROUNDOFF,
    attention_bound,
    sequential_sum_error,
)

from .axes import Order, as_declared, find_order
from .logprobs import target_logprobs
from .source import open_checkpoint
from .sum_bounds import NORMS, n_terms, norm_bound, norm_sum_error
from .trace_format import LOGPROBS, Call, n_cached

Key = tuple[int, str]  # of an activation: the index of its call, and its name
Activations = Mapping[Key, Array]
LayerCache = tuple[()] | tuple[Array, Array]  # cached keys and values [B, N, S, K], if any
TablesAndMask = tuple[tuple[Array, Array], Array]  # RoPE cos, sin [B, T, K / 2]; mask [B, T, S]

# Stages are numbered by layer. Around the layers stand the embedding and, at n_layers, the head.
EMBEDDING_STAGE = -1
NOT_STARTED = -2


def stage_names(config: LlamaConfig, stage: int) -> list[str]:
    """Return the names of a stage's activations."""
    if stage == EMBEDDING_STAGE:
        return ["embed"]
    if stage == config.n_layers:
        return ["norm", "logits"]
    return [f"layers.{stage}.{name}" for name in LAYER_AXES]


def stage_input(stage: int) -> str:
    """Return the name of the residual stream that a stage reads; "" for the embedding."""
    if stage == EMBEDDING_STAGE:
        return ""
    return "embed" if stage == 0 else f"layers.{stage - 1}.residual"


def is_layer(config: LlamaConfig, stage: int) -> bool:
    """Return whether a stage is a layer, neither the embedding nor the head."""
    return 0 <= stage < config.n_layers


def finite_only(activations: Activations) -> dict[Key, Array]:
    """Return the activations that hold no NaN and no infinity."""
    return {key: value for key, value in activations.items() if np.isfinite(value).all()}


def tables_and_masks(
    config: LlamaConfig, calls: Sequence[Call], dtype: str, ops: Ops
) -> list[TablesAndMask]:
    """Compute every call's RoPE tables [B, T, K / 2] and mask [B, T, S], which all layers read."""
    inputs = []
    for c, call in enumerate(calls):
        start = n_cached(calls, c)
        positions, mask = fill_and_check_inputs(
            call.tokens, call.positions, call.mask, start, config, ops
        )
        inputs.append((ops.rope_tables(positions, config, dtype), mask))
    return inputs


class RoundedParams(Mapping[str, Array]):
    """Reads a checkpoint's parameters, rounded to the precision under test, in ``dtype``.

    ``perturbation`` is a seed; unless it is 0, every element is moved up or down by 2 u of itself,
    one unit in the last place, in the same direction at every reading.
    """

    def __init__(self, path: Path, precision: str, dtype: str, perturbation: int = 0) -> None:
        self.checkpoint = open_checkpoint(path, "float64" if precision == "float64" else "float32")
        self.precision, self.dtype, self.perturbation = precision, dtype, perturbation

    def __getitem__(self, name: str) -> Array:
        value = self.checkpoint[name]
        if self.perturbation:
            signs = _signs(value.shape, zlib.crc32(name.encode()), self.perturbation)
            value = value * (1 + 2 * UNIT_ROUNDOFF[self.precision] * signs).astype(value.dtype)
        if self.precision in ("bfloat16", "float16"):
            value = round_to(value, self.precision)
        return value.astype(self.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)


def _signs(shape: tuple[int, ...], *seed: int) -> Array:
    """Draw 1 or -1 for every element of ``shape``, in float32."""
    drawn = np.random.default_rng(seed).integers(0, 2, shape, dtype=np.int8)
    signs: Array = 2 * drawn.astype(np.float32) - 1
    return signs


class CachedParams(dict[str, Array]):
    """Parameters that are read when first asked for and kept while one stage runs."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        super().__init__()
        self._params = params

    def __missing__(self, name: str) -> Array:
        self[name] = self._params[name]
        return self[name]


def _of_targets(c: int, call: Call, logits: Array) -> dict[Key, Array]:
    """Return the log-probabilities of a call's targets, where it has some."""
    return {} if call.targets is None else {(c, LOGPROBS): target_logprobs(logits, call.targets)}


class Replay:
    """Runs one variant of the oracle: its operations, its dtype, every call's residual stream.

    ``inspects``: derive a bound for each element of attention and of the norms, and recognise
    activations of the other side that are stored with their axes in another order. ``inputs``:
    the result of ``tables_and_masks``, where it was computed before.
    """

    def __init__(
        self,
        config: LlamaConfig,
        calls: Sequence[Call],
        params: RoundedParams,
        ops: Ops = reference_ops,
        inspects: bool = False,
        inputs: Sequence[TablesAndMask] | None = None,
    ) -> None:
        self.config, self.calls, self.params, self.ops = config, calls, params, ops
        self.inspects = inspects
        # Of attention [B, T, H, K] and the norms [B, T, D], of the stage last run.
        self.element_bounds: dict[Key, Array] = {}
        self.orders: dict[Key, Order] = {}  # of the other side's axes, where not as declared
        self.streams: dict[int, Array] = {}  # call -> residual stream [B, T, D]
        self.last_stage = NOT_STARTED
        if inputs is None:
            inputs = tables_and_masks(config, calls, params.dtype, ops)
        self.inputs = inputs

    def start_from(self, call: int, stream: Array | None) -> bool:
        """Set a call's residual stream, all finite; return False where it is not [B, T, D]."""
        shape = (*self.calls[call].tokens.shape, self.config.dim)
        if stream is None or stream.shape != shape:
            return False
        self.streams[call] = stream.astype(self.params.dtype)
        return True

    def copy_state(self, other: "Replay") -> None:
        """Take over the residual streams and the last stage of a replay of the same calls."""
        self.streams, self.last_stage = dict(other.streams), other.last_stage

    def run(
        self,
        stage: int,
        theirs: Activations | None = None,
        params: Mapping[str, Array] | None = None,
    ) -> dict[Key, Array]:
        """Run a stage of every call whose residual stream is known; return its activations.

        ``theirs``, all finite, makes the run teacher-forced. With perturbed parameters each sum,
        attention's included, is perturbed too, within its rounding error. ``params`` are the
        stage's parameters where they were read before.
        """
        activations: dict[Key, Array] = {}
        self.element_bounds.clear()
        inside = is_layer(self.config, stage)
        params = CachedParams(self.params) if params is None else params
        layer = layer_params(params, stage, self.config, self.ops) if inside else {}
        caches: dict[int, tuple[Array, Array]] = {}
        for c, call in enumerate(self.calls):
            is_given = theirs is not None and self.start_from(
                c, theirs.get((c, stage_input(stage)))
            )
            if not is_given and self.last_stage not in (NOT_STARTED, stage - 1):
                self.streams.pop(c, None)  # it belongs to an earlier stage
            ready = call.after is None or call.after in caches or not inside
            if stage >= 0 and not (c in self.streams and ready):
                continue
            cache = caches.get(call.after, ()) if call.after is not None else ()
            trace = self._trace_callback(stage, c, cache, theirs, activations)
            if stage == EMBEDDING_STAGE:
                weight = self.ops.read(params, EMBED, self.config)
                self.streams[c] = self.ops.embed(weight, call.tokens)
                trace("embed", self.streams[c])
            elif stage == self.config.n_layers:
                logits = head(params, self.streams[c], self.config, trace, self.ops)
                activations |= _of_targets(c, call, logits)
            else:
                tables, mask = self.inputs[c]
                self.streams[c], caches[c] = block(
                    layer,
                    self.streams[c],
                    self.config,
                    tables,
                    mask,
                    cache or None,
                    trace,
                    self.ops,
                )
        self.last_stage = stage
        return activations

    def _trace_callback(
        self,
        stage: int,
        c: int,
        cache: LayerCache,
        theirs: Activations | None,
        activations: dict[Key, Array],
    ) -> TraceCallback:
        """Return the callback that keeps a call's activations in ``activations``.

        With ``theirs`` it then overwrites the oracle's array in place, so that the operations
        after it read the other side's activation.
        """
        prefix = f"layers.{stage}." if is_layer(self.config, stage) else ""
        used: dict[str, Array] = {}  # the stage's activations, as its later operations read them

        def trace(kind: str, value: Array) -> None:
            key = (c, prefix + kind)
            used[kind] = value
            self._bound_and_perturb(key, kind, value, stage, cache, used)
            if theirs is None:
                activations[key] = value
                return
            activations[key] = value.copy()
            given = theirs.get(key)
            if given is not None and given.shape == value.shape:
                if self.inspects and (order := find_order(given, value)):
                    self.orders[key] = order
                    given = as_declared(given, order)
                value[...] = given

        return trace

    def _bound_and_perturb(
        self,
        key: Key,
        kind: str,
        value: Array,
        stage: int,
        cache: LayerCache,
        used: Mapping[str, Array],
    ) -> None:
        """Bound attention and the norms by element; perturb ``value`` if the parameters are."""
        (c, name), seed = key, self.params.perturbation
        precision = self.params.precision
        if kind == "attn" and (self.inspects or seed):
            self.element_bounds[key] = self._attention_bound(c, used, cache)
            if seed:
                signs = _signs(value.shape, stage, c, seed)
                value += signs * self.element_bounds[key] / BASELINE_FACTOR
        elif kind in NORMS and (self.inspects or seed) and precision != "float64":
            x = used["attn_residual"] if kind == "ffn_norm" else self.streams[c]
            error = norm_sum_error(x, self.config.norm_eps, precision)
            self.element_bounds[key] = norm_bound(value, error, precision)
            if seed:  # a token's elements share the error
                value *= 1 + _signs(error.shape, zlib.crc32(name.encode()), c, seed) * error
        elif seed and (n := n_terms(self.config, kind)):
            signs = _signs(value.shape, zlib.crc32(name.encode()), c, seed)
            size = np.sqrt(np.mean(value**2, axis=-1, keepdims=True))
            value += signs * (sequential_sum_error(n, precision) * size)

    def _attention_bound(self, c: int, used: Mapping[str, Array], cache: LayerCache) -> Array:
        """Return the error bound of each element of a call's attention output [B, T, H, K]."""
        k_BNSK, v_BNSK = used["k_rope"].swapaxes(1, 2), used["v"].swapaxes(1, 2)
        if cache:
            k_BNSK, v_BNSK = self.ops.extend(cache[0], k_BNSK), self.ops.extend(cache[1], v_BNSK)
        mask = self.inputs[c][1]
        return attention_bound(used["q_rope"], k_BNSK, v_BNSK, mask, self.params.precision)
