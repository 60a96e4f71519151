"""Compute the global norm of gradients, sharded or not, and scale them in place."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.sharded_tensor import is_sharded, local_part

CHUNK = 1024  # elements whose squares are summed in float32


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the global 2-norm of gradients, a scalar; of sharded ones, over all shards."""
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
    """Return the 2-norm of all tensors together, a scalar in float32 or wider.

    A CPU adds squares sequentially, which in float32 errs by a percent for a large matrix: there,
    the squares of CHUNK elements are summed in float32, and those sums in float64.
    """
    dtype = tensors[0].dtype if tensors[0].dtype == torch.float64 else torch.float32
    if tensors[0].is_cuda:
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    else:
        norms = torch.cat([part for tensor in tensors for part in _chunk_norms(tensor, dtype)])
    return torch.linalg.vector_norm(norms, dtype=torch.float64).to(dtype)


def _chunk_norms(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the 2-norms of chunks of CHUNK elements, and the elements left over."""
    flat = tensor.reshape(-1)
    even = len(flat) // CHUNK * CHUNK
    rows, rest = flat[:even].view(-1, CHUNK), flat[even:]
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype), rest.to(dtype)


def scale_(grads: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients, sharded or not, by a scalar, in place."""
    torch._foreach_mul_([local_part(grad) for grad in grads], factor)
