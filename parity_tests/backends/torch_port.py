"""Helpers for a backend of a PyTorch port: arrays, float64, caches written in place, gradients.

    from parity_tests.backends.torch_port import lifted, to_numpy, to_torch

They import torch and nothing of llama_torch.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.backend import Array, Params
from reference_np.grad import Batch
from reference_np.ops import IGNORE

Tensors = dict[str, Tensor]


def to_torch(array: Array) -> Tensor:
    """Return a copy of an array as a tensor of the same dtype, bfloat16 of ml_dtypes too."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as an array, without its graph; of bfloat16 and float16 as float32."""
    kept = tensor.dtype in (torch.float64, torch.float32)
    array: Array = (tensor if kept else tensor.float()).detach().cpu().numpy()
    return array


def with_parameters(
    module: nn.Module, params: Params, convert: Callable[[Tensors], Tensors] = dict
) -> Any:
    """Return a module with the protocol's parameters, in their dtype, for inference.

    convert  from the protocol's parameters to the module's by name.
    """
    tensors = {name: to_torch(value) for name, value in params.items()}
    module.load_state_dict(convert(tensors), assign=True)
    return module.eval()


def lifted(params: Params) -> AbstractContextManager[Any]:
    """Return a context in which casts to float32 are to float64, if the parameters are float64.

    Ports compute norms, angles and softmax in float32 whatever the model's dtype is. That limits
    a comparison in float64 to some 1e-7, too coarse to see a wrong epsilon. Build the model in
    the context too: tables of angles are made then.
    """
    is_float64 = next(iter(params.values())).dtype == np.float64
    return LiftFloat32() if is_float64 else nullcontext()


def continued(cache: Any, fresh: Callable[[], nn.Module]) -> Any:
    """Return the module to continue a sequence with, whose caches lie in it and are written to.

    It is ``fresh()`` at first and then a copy of ``cache``, the module after an earlier call; so
    that ``decode`` can return the module itself as a cache that is a value.
    """
    return fresh() if cache is None else copy.deepcopy(cache)


def loss_and_grads(
    module: nn.Module,
    params: Params,
    batches: Sequence[Batch],
    z_loss: float,
    convert: Callable[[Tensors], Tensors] = dict,
) -> tuple[float, dict[str, Array]]:
    """Return the mean loss over every valid target and its gradients, by the protocol's names.

    module   called with tokens, positions and mask as tensors or None; returns logits [B, T, V].
    convert  from the protocol's parameters to the module's by name, differentiably, where the
             module's have other names, are joined or permuted.
    """
    leaves = {name: to_torch(value).requires_grad_() for name, value in params.items()}
    count = sum(int(np.sum(batch.targets != IGNORE)) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = (None if x is None else to_torch(x) for x in (batch[0], batch[2], batch[3]))
        logits = functional_call(module, convert(leaves), tuple(inputs))
        targets = to_torch(batch.targets)
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        log_z = logits.logsumexp(-1)[targets != IGNORE]
        mean = (loss + z_loss * (log_z**2).sum()) / count
        mean.backward()
        total += mean.item()
    return total, {name: to_numpy(leaf.grad) for name, leaf in leaves.items()}
