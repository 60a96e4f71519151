"""The norm of gradients, sharded or not, and their scaling in place."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.sharded_tensor import is_sharded, local_part

STRETCH = 1024  # elements


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of gradients of which processes may hold different shards."""
    groups: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for grad in grads:
        mesh: Any = None
        axes: tuple[int, ...] = ()
        if is_sharded(grad):
            mesh = grad.device_mesh
            axes = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
            grad = grad.to_local()
        groups.setdefault((mesh, axes), []).append(grad)
    squares = []
    for (mesh, axes), tensors in groups.items():
        square = norm_of(tensors).square()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, in float32 or wider.

    A CPU adds the squares one after the other, and of a large matrix a float32 sum is off by a
    percent: there, stretches of it are summed first. What they give is added in float64.
    """
    dtype = tensors[0].dtype if tensors[0].dtype == torch.float64 else torch.float32
    if tensors[0].is_cuda:
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    else:
        norms = torch.cat([part for tensor in tensors for part in _stretches(tensor, dtype)])
    return torch.linalg.vector_norm(norms, dtype=torch.float64).to(dtype)


def _stretches(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = tensor.reshape(-1)
    even = len(flat) // STRETCH * STRETCH
    rows, rest = flat[:even].view(-1, STRETCH), flat[even:]
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype), rest.to(dtype)


def scale_(grads: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients, sharded or not, by a scalar, in place."""
    torch._foreach_mul_([local_part(grad) for grad in grads], factor)
