"""Tell sharded tensors from whole ones."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor; only then is torch's module for them imported."""
    if type(tensor) in (Tensor, Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the whole tensor if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def with_local(like: Tensor, part: Tensor) -> Tensor:
    """Return a tensor sharded as ``like`` whose shard on this process is ``part``."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    placed = like.device_mesh, like.placements
    return DTensor.from_local(part, *placed, shape=like.shape, stride=like.stride())


def all_parts(part: Tensor, like: Tensor) -> Tensor:
    """Return the parts of the processes that share ``like``, stacked along a new first axis."""
    from torch.distributed.tensor import DTensor, Shard

    assert is_sharded(like)
    return DTensor.from_local(part[None], like.device_mesh, [Shard(0)]).full_tensor()
