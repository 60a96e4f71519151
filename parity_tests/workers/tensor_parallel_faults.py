"""Faults of tensor parallelism, each planted by patches that an ExitStack takes back."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import SequenceParallel

from llama_torch.common.sharded_tensor import all_parts, is_sharded
from llama_torch.distributed import tensor_parallel
from llama_torch.model import loss, vocab_part
from llama_torch.model.vocab_part import VocabPart
from llama_torch.training import step
from llama_torch.training.clip import norm_of


class UnsummedNorm(SequenceParallel):
    """A norm whose weight's gradient is that of this process's positions alone."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        module = super()._apply(module, device_mesh)

        def forward(x: DTensor) -> DTensor:
            size, weight = x.shape[-1:], module.weight.to_local()
            made = F.rms_norm(x.to_local(), size, weight, module.eps)
            return DTensor.from_local(made, x.device_mesh, x.placements)

        module.forward = forward
        return module


def norm_gradients_unsummed(stack: ExitStack) -> None:
    """Do not sum the norm weights' gradients over the processes."""
    stack.enter_context(patch.object(tensor_parallel, "SequenceParallel", UnsummedNorm))


def own_maximum(stack: ExitStack) -> None:
    """Add the sums of exponentials as if they had one maximum, this process's."""

    def unreduced(part: Tensor, like: Tensor) -> Tensor:
        parts = all_parts(part, like)
        parts[:, 0] = part[0]
        return parts

    stack.enter_context(patch.object(vocab_part, "all_parts", unreduced))


def own_sum(stack: ExitStack) -> None:
    """Normalise by this process's sum of exponentials."""

    def unreduced(part: Tensor, like: Tensor) -> Tensor:
        parts = all_parts(part, like)
        parts[dist.get_rank() - 1, 1] = 0  # of two processes, the other
        return parts

    stack.enter_context(patch.object(vocab_part, "all_parts", unreduced))


class Greedy(VocabPart):
    """Takes the targets of other processes for its first row."""

    def columns(self, targets_P: Tensor) -> tuple[Tensor, Tensor]:
        column_P, _ = super().columns(targets_P)
        return column_P, targets_P >= 0


def others_targets_counted(stack: ExitStack) -> None:
    """Count a target of another process as one of this process's."""
    stack.enter_context(patch.object(loss, "VocabPart", Greedy))


def others_tokens_embedded(stack: ExitStack) -> None:
    """Look up a token of another process in this process's rows."""
    stack.enter_context(patch.object(tensor_parallel, "VocabPart", Greedy))


class Even(VocabPart):
    """Begins where it would if the processes' rows were as many, rounded down."""

    def __init__(self, head_VD: Tensor) -> None:
        super().__init__(head_VD)
        if is_sharded(head_VD):
            mesh = head_VD.device_mesh
            self.first = len(head_VD) // mesh.size() * mesh.get_local_rank()


def uneven_parts_misplaced(stack: ExitStack) -> None:
    """Begin the parts of an uneven vocabulary too early."""
    stack.enter_context(patch.object(loss, "VocabPart", Even))


def hidden_gradients_unsummed(stack: ExitStack) -> None:
    """Take the gradient of the hidden states from this process's logits alone."""
    real = DTensor.to_local

    def unsummed(self: DTensor, *, grad_placements: Any = None) -> Tensor:
        is_hidden = grad_placements is not None and grad_placements[0].is_partial()
        return real(self, grad_placements=[Replicate()] if is_hidden else grad_placements)

    stack.enter_context(patch.object(DTensor, "to_local", unsummed))


def padding_seen(stack: ExitStack) -> None:
    """Let every position see the padding ones, where a mask is given."""
    real = tensor_parallel._padded

    def padded(n: int, tokens: Tensor, positions: Any, mask: Any) -> Any:
        tokens, positions, mask = real(n, tokens, positions, mask)
        if mask is not None:
            mask[:, :, -n:] = True
        return tokens, positions, mask

    stack.enter_context(patch.object(tensor_parallel, "_padded", padded))


def copies_in_the_norm(stack: ExitStack) -> None:
    """Count the elements of a copied gradient once for each process that has a copy."""

    def norm(grads: Iterable[Tensor]) -> Tensor:
        square = norm_of([grad.to_local() for grad in grads if is_sharded(grad)]).square()
        dist.all_reduce(square)
        return torch.sqrt(square)

    stack.enter_context(patch.object(step, "global_norm", norm))


FAULTS: dict[str, Callable[[ExitStack], None]] = {
    made.__name__: made
    for made in (
        norm_gradients_unsummed,
        own_maximum,
        own_sum,
        others_targets_counted,
        others_tokens_embedded,
        uneven_parts_misplaced,
        hidden_gradients_unsummed,
        padding_seen,
        copies_in_the_norm,
    )
}
