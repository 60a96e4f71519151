"""The protocol of a backend: an implementation under test, with NumPy arrays in and out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import InputError, LlamaConfig
from .grad import Batch
from .importing import module_of as module_of
from .importing import named_object
from .limits import UNLIMITED, Limits
from .optim import Hyperparameters
from .shipped import SHIPPED as SHIPPED

Array = NDArray[Any]

Params = Mapping[str, Array]
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Backend:
    """The methods of an implementation under test; ``logits`` or ``from_directory`` is required.

    Copy ``parity_tests/backends/template.py`` and fill it in. Deriving from this class is
    optional: any object (or class, or module) with these methods will do. Leave a method out, or
    raise NotImplementedError with a reason in your own file, where your implementation has no
    such function; the test is counted as not covered, never as passed. One that comes from
    deeper inside a library is a failure. Every call but ``append`` brings all it needs and must
    not depend on calls before it. A call that writes to an array it is given, or to one that an
    earlier call returned, is a failure of its own, though its results are judged as if it did not.

    limits            reference_np.limits.Limits, inside which all examples are drawn: head_dim,
                      masks, positions, cache, rotary scaling, context, batch and more; no limits
                      where you leave this out.

    dtypes            the precisions you compute in, among "float64", "float32", "bfloat16" and
                      "float16"; float64 and float32 where you leave this out. Most checks are of
                      the most precise one. In float64 rounding is too small to hide a bug; without
                      float64 in the list, the best one is judged beside plain NumPy in that
                      precision. Parameters arrive in the precision under test (bfloat16 as
                      ml_dtypes').
    example_fraction  the fraction of the examples to run, above 0 and at most 1.0 (all). Named by
                      --backend, some 40 are run however small it is.

    The arguments, where B is the batch, T the tokens of this call, S = cached + T, V the
    vocabulary:

    config     attributes dim, n_layers, n_heads, n_kv_heads, head_dim (not always dim /
               n_heads), hidden_dim, vocab_size, max_seq_len, norm_eps, rope_theta,
               tie_embeddings; and of rotary scaling rope_type ("default", "linear" or
               "llama3"; Llama 2 has "default"), rope_factor, rope_low_freq_factor,
               rope_high_freq_factor and rope_original_max_seq_len
               (reference_np.ops.rope_frequencies has the equations).
    params     Hugging Face name -> array, matrices [out, in], rotate-half order. With tied
               embeddings there is no lm_head.weight.
    tokens     int64 [B, T].
    positions  int64 [B, T], the rotary positions, any order, below max_seq_len, which may be
               70,000; None: they follow the cache.
    mask       bool [B, T, S], True = may attend, to later keys as well; every query may attend
               to itself. None: causal. Padding is told by the mask and the positions alone:
               reference_np.limits.real_tokens(mask) is the attention_mask [B, S] of others.

    Return float arrays of any precision; they are compared in float64.
    """

    dtypes: Sequence[str] = ("float64", "float32")
    example_fraction: float = 1.0
    limits: Limits = UNLIMITED

    def logits(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
    ) -> Array:
        """Return the logits [B, T, V] of one pass without a cache."""
        raise NotImplementedError("logits")

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Any,
    ) -> tuple[Array, Any]:
        """Return logits [B, T, V] and the cache that continues the sequence.

        ``cache`` is None at first, then whatever an earlier call returned; the same cache may
        be continued twice, so a call must not change it (unless limits.cache is "in place").
        """
        raise NotImplementedError("decode")

    def start(self, config: LlamaConfig, params: Params, rows: Sequence[Array]) -> Array:
        """Forget all sequences, begin one with each row; return the logits [B, V] of the next.

        ``start`` and ``append`` are for engines that own their cache. ``rows`` are the prompts,
        int64 [T] each, of unequal lengths (unless limits.equal_rows).
        """
        raise NotImplementedError("start")

    def append(self, tokens: Array) -> Array:
        """Append tokens [B, T] to the running sequences; return the logits [B, V] of the next."""
        raise NotImplementedError("append")

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        """Read a model directory by your own loader or converter, to compute in ``dtype``.

        Return a function from tokens, int64 [B, T], to causal logits [B, T, V]. The directory is in
        Hugging Face's form: config.json as transformers 4 or 5 writes it, safetensors in one file
        or in shards with an index, in float32, bfloat16 or float16. It is yours to write to, and
        removed after the call of that function.
        """
        raise NotImplementedError("from_directory")

    def trace(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
    ) -> Mapping[str, Array]:
        """Return every activation of reference_np.naming.activation_axes, by that name."""
        raise NotImplementedError("trace")

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Any,
    ) -> tuple[Mapping[str, Array], Any]:
        """Return the activations, as ``trace`` does, and the new cache, as ``decode`` does."""
        raise NotImplementedError("traced_decode")

    def effective_params(self, config: LlamaConfig, params: Params) -> Params:
        """Return the weights that are computed with, dequantised, in float64.

        Only for a backend that quantises its weights: the oracle then computes with the returned
        ones, which must be roundings of the given ones, to one bit at the least. Such a backend is
        best judged in float64, whose tolerance does not depend on the precision of the given ones.
        """
        raise NotImplementedError("effective_params")

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        """Return the mean loss over every valid target of all batches, and its gradients.

        A batch is (tokens [B, T], targets [B, T], positions, mask); a target of -100 is ignored.
        ``z_loss (log Z)^2`` is added to each valid target's loss. Gradients are by parameter name,
        each of its parameter's shape.
        """
        raise NotImplementedError("loss_and_grads")

    def train(
        self,
        config: LlamaConfig,
        params: Params,
        batches: Sequence[Batch],
        hyper: Hyperparameters,
        steps: int,
    ) -> Mapping[str, Any]:
        """Take ``steps`` AdamW steps as reference_np.optim does, each over all ``batches``.

        Return "loss" and "grad_norm" (before clipping), each [steps], and "params",
        "exp_avg" and "exp_avg_sq" (the moments) after the last step, each by parameter name.
        """
        raise NotImplementedError("train")


@cache  # one object for all tests, however long it takes to make
def load(spec: str, flag: str = "--backend") -> Any:
    """Import a backend by its name; InputError if there is none, or one that contradicts itself.

    The name is a shipped one, ``package.module:object``, where the module may lie in the current
    folder, or ``FILE.py:object``. What the module warns of while it is imported is printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            found = named_object(spec)
        why = _contradiction(found)
    except InputError as error:
        raise InputError(f"{flag} {spec}: {error}") from error
    if why:
        raise InputError(f"{flag} {spec}: {why}; see reference_np/backend.py")
    return found


def _contradiction(backend: Any) -> str:
    """Return what a backend lacks of what it declares; "" where nothing."""
    if not any(callable(getattr(backend, name, None)) for name in ("logits", "from_directory")):
        return "has no method logits, and no from_directory"
    declared = getattr(backend, "dtypes", None) or Backend.dtypes
    if not isinstance(declared, tuple | list) or any(one not in DTYPES for one in declared):
        return f"dtypes must be among {', '.join(DTYPES)}, in a tuple, got {declared!r}"
    if why := _bad_fraction(backend):
        return why
    limits = getattr(backend, "limits", UNLIMITED)
    if not isinstance(limits, Limits):
        return f"limits must be a reference_np.limits.Limits, not {type(limits).__name__}"
    offered = {name for name in ("decode", "start", "append") if _is_offered(backend, name)}
    needed = {"in place": {"decode"}, "engine": {"start", "append"}}.get(limits.cache, set())
    if absent := sorted(needed - offered):
        return f"limits.cache is {limits.cache!r}, without a method {' or '.join(absent)}"
    if len(offered & {"start", "append"}) == 1:
        return "start and append need each other"
    if others := set(limits.float32_angles) - set(declared):
        return f"limits.float32_angles has {', '.join(sorted(others))}, not among its dtypes"
    return ""


def _bad_fraction(backend: Any) -> str:
    """Return what is wrong with a backend's fraction of the examples; "" where nothing."""
    with suppress(TypeError, ValueError):
        if 0 < example_fraction_of(backend) <= 1:  # not of NaN
            return ""
    name = "share" if hasattr(backend, "share") else "example_fraction"
    given = getattr(backend, name)
    return f"{name} must be a number above 0 and at most 1, which is all examples, got {given!r}"


def _is_offered(backend: Any, name: str) -> bool:
    """Return whether a backend has a method, not that of Backend, which raises."""
    method = getattr(backend, name, None)
    return callable(method) and getattr(method, "__func__", None) is not getattr(Backend, name)


def dtypes_of(backend: Any) -> tuple[str, ...]:
    """Return the precisions that a backend computes in, most precise first, however declared."""
    declared = getattr(backend, "dtypes", None) or Backend.dtypes
    # The halves in the backend's own order: one is more precise, the other has the wider range.
    return tuple(sorted(declared, key=lambda dtype: min(DTYPES.index(dtype), 2)))


def example_fraction_of(backend: Any) -> float:
    """Return the fraction of the examples to run; ``share`` is its former name."""
    default = getattr(backend, "example_fraction", Backend.example_fraction)
    return float(getattr(backend, "share", default))


def effective_params_of(backend: Any, config: LlamaConfig, params: Params) -> Params:
    """Return the backend's dequantised weights in float64; ``params`` where it quantises none.

    ``held`` is the former name of the method.
    """
    for name in ("held", "effective_params"):
        if callable(method := getattr(backend, name, None)):
            with suppress(NotImplementedError):
                dequantised: Params = method(config, params)
                return dequantised
    return {name: value.astype(np.float64) for name, value in params.items()}
