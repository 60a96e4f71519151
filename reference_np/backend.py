"""The protocol of a backend, through which an implementation is tested: NumPy in and out."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from numpy.typing import NDArray

from .config import InputError, LlamaConfig
from .grad import Batch
from .optim import Hyperparameters

Array = NDArray[Any]

Params = Mapping[str, Array]


class Backend:
    """What a porter writes. Only ``logits`` is required; copy ``template.py`` and fill it in.

    Deriving from this class is optional: any object (or class, or module) with these methods
    will do. For what you do not offer, leave the method out or raise NotImplementedError with
    a reason; it is counted as not covered, never as passed. Every call brings all it needs and
    must not depend on calls before it.

    dtypes   the precisions you compute in, most precise first, among "float64", "float32",
             "bfloat16" and "float16". float64 is worth having: it leaves rounding nowhere to
             hide a bug. Without it the first one listed is judged beside plain NumPy in that
             precision. Parameters arrive in the precision under test (bfloat16 as ml_dtypes').
    share    the part of the examples that you can afford, 1.0 for all.

    The arguments, where B is the batch, T the tokens of this call, S = cached + T, V the
    vocabulary:

    config     attributes dim, n_layers, n_heads, n_kv_heads, head_dim (not always dim /
               n_heads), hidden_dim, vocab_size, max_seq_len, norm_eps, rope_theta and
               tie_embeddings.
    params     Hugging Face name -> array, matrices [out, in], rotate-half order. With tied
               embeddings there is no lm_head.weight.
    tokens     int64 [B, T].
    positions  int64 [B, T], the rotary positions, any order, up to 70,000; None: they follow
               the cache.
    mask       bool [B, T, S], True = may attend; every query may attend to itself. None: causal.

    Return float arrays of any precision; they are compared in float64.
    """

    dtypes: Sequence[str] = ("float64", "float32")
    share: float = 1.0

    def logits(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
    ) -> Array:
        """Return the logits [B, T, V] of one pass without a cache. Required."""
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
        be continued twice, so a call must not change it.
        """
        raise NotImplementedError("decode")

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

    def held(self, config: LlamaConfig, params: Params) -> Params:
        """Return the weights, float64, that ``params`` become where they are held quantised.

        For those alone whose weights are no longer the ones given: the oracle then gets these.
        Judge them in float64, whose tolerance does not depend on the given ones.
        """
        raise NotImplementedError("held")

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        """Return the mean loss over every valid target of all batches, and its gradients.

        A batch is (tokens [B, T], targets [B, T], positions, mask); a target of -100 does not
        count. z_loss adds that many times (log Z)^2 for each valid target.
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
        """Take ``steps`` AdamW steps, each over all ``batches``; hyper is reference_np.optim's.

        Return "loss" and "grad_norm" (before clipping), each [steps], and "params",
        "exp_avg" and "exp_avg_sq" (the moments after the last step), each by parameter name.
        """
        raise NotImplementedError("train")


# Names for the shipped ones; anybody else's is package.module:object.
SHIPPED = {
    "torch": "parity_tests.backends.torch_backends:eager",
    "torch-math": "parity_tests.backends.torch_backends:math",
    "torch-flash": "parity_tests.backends.torch_backends:flash",
    "torch-static": "parity_tests.backends.decoding_backends:static",
    "torch-numpy": "parity_tests.backends.decoding_backends:numpy_step",
    "torch-int8": "parity_tests.backends.decoding_backends:int8",
    "torch-compile": "parity_tests.backends.torch_backends:compiled",
    "transformers": "parity_tests.backends.transformers_backend:backend",
    "jax": "parity_tests.backends.jax_backend:backend",
    "cuda": "parity_tests.backends.torch_backends:cuda",
    "cuda-math": "parity_tests.backends.torch_backends:cuda_math",
    "cuda-flash": "parity_tests.backends.torch_backends:cuda_flash",
    "cuda-efficient": "parity_tests.backends.torch_backends:cuda_efficient",
    "cuda-compile": "parity_tests.backends.torch_backends:cuda_compiled",
    "cuda-static": "parity_tests.backends.decoding_backends:cuda_static",
    "cuda-kernels": "parity_tests.backends.decoding_backends:cuda_kernels",
    "cuda-kernels-int8": "parity_tests.backends.decoding_backends:cuda_kernels_int8",
    "cuda-batch-kernels": "parity_tests.backends.decoding_backends:cuda_batch_kernels",
    "cuda-batch-kernels-int8": "parity_tests.backends.decoding_backends:cuda_batch_kernels_int8",
    "cuda-graph": "parity_tests.backends.decoding_backends:cuda_graph",
    "cuda-graph-compile": "parity_tests.backends.decoding_backends:cuda_graph_compiled",
}


@cache  # one object for all tests, however long it takes to make
def load(spec: str, flag: str = "--backend") -> Any:
    """Import a backend by its shipped name or as ``package.module:object``; InputError if none."""
    target = SHIPPED.get(spec, spec)
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split(".") if path else ():
            found = getattr(found, part)
        found = found() if inspect.isclass(found) else found
    except (Exception, SystemExit) as error:  # whatever somebody's module does
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{flag} {spec}: cannot be imported ({why}); give package.module:object or one of "
            f"{', '.join(SHIPPED)}"
        ) from error
    if not callable(getattr(found, "logits", None)):
        raise InputError(f"{flag} {spec}: has no method logits; see reference_np/backend.py")
    known = {"float64", "float32", "bfloat16", "float16"}
    if not set(dtypes_of(found)) <= known:
        raise InputError(f"{flag} {spec}: dtypes {found.dtypes} must be among {sorted(known)}")
    return found


def dtypes_of(backend: Any) -> tuple[str, ...]:
    """Return the precisions that a backend computes in, most precise first."""
    return tuple(getattr(backend, "dtypes", None) or Backend.dtypes)
