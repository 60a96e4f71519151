"""The rows of the vocabulary projection that a process holds, and the sums it takes of others.

With tensor parallelism a process computes the logits of its own rows alone. A softmax over the
whole vocabulary needs three numbers a position of each process: its largest logit, its sum of
exponentials, and the target's logit where it is one of its own.

Suffixes: P positions of a chunk, D dim, V vocabulary, R processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.sharded_tensor import all_parts, is_sharded, local_part, with_local


class RowSums(NamedTuple):
    """What the loss takes of the exponentials of each row of logits, each [P]."""

    log_z: Tensor  # of the whole vocabulary
    target_logit: Tensor  # 0 where a row has no target
    exp_sum: Tensor  # of the whole vocabulary, relative to this process's largest logit

    def nats(self, z_loss: float) -> Tensor:
        """Return the loss [P]: -log p(target), and z_loss times (log Z)^2."""
        return self.log_z - self.target_logit + z_loss * self.log_z.square()


class VocabPart:
    """The rows from ``first`` on of a projection [V, D]; all of them where it is not sharded.

    ``head_VD`` is a plain tensor, or a DTensor whose rows a group of processes shares. Each has
    ``n_most`` rows, but the last ones may have fewer.
    """

    def __init__(self, head_VD: Tensor) -> None:
        self.head_VD, self.weight_VD = head_VD, local_part(head_VD).detach()
        self.first, self.n_most = 0, len(head_VD)
        self.is_whole = not is_sharded(head_VD)
        if is_sharded(head_VD):
            mesh = head_VD.device_mesh
            self.n_most = -(-len(head_VD) // mesh.size())
            self.first = self.n_most * mesh.get_local_rank()

    def columns(self, targets_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return each target's column in this part, and whether it is in it, of any shape."""
        if self.is_whole:
            return targets_P.clamp(min=0), targets_P >= 0
        column_P = targets_P - self.first
        is_here_P = (column_P >= 0) & (column_P < len(self.weight_VD))
        return column_P.where(is_here_P, 0), is_here_P

    def exponentials_(self, logits_PV: Tensor, target_logit: Tensor) -> RowSums:
        """Replace this part's logits by ``exp(logit - largest)`` in place; return the rows' sums.

        ``target_logit`` [P] is 0 where the target is not in this part. Collective, but of a whole
        vocabulary.
        """
        max_logit = logits_PV.amax(-1)
        exp_sum = logits_PV.sub_(max_logit[:, None]).exp_().sum(-1)
        if self.is_whole or not len(logits_PV):  # all processes have the same rows
            return RowSums(max_logit + exp_sum.log(), target_logit, exp_sum)
        parts = all_parts(torch.stack([max_logit, exp_sum, target_logit]), self.head_VD)
        max_RP, exp_sum_RP, target_RP = parts.unbind(1)
        highest = max_RP.amax(0)
        exp_sum = (exp_sum_RP * (max_RP - highest).exp()).sum(0)
        # Infinite where this part's probabilities are too small for a number: they become zero.
        relative = exp_sum * (highest - max_logit).exp()
        return RowSums(highest + exp_sum.log(), target_RP.sum(0), relative)

    def gradient(self) -> Tensor:
        """Return this part of the projection's gradient, to be added to in place; zeros if new."""
        if self.head_VD.grad is None:
            self.head_VD.grad = torch.zeros_like(self.head_VD)
        return local_part(self.head_VD.grad)

    def add_gradient(self, d_VD: Tensor) -> None:
        """Add to this part of the projection's gradient."""
        if self.head_VD.grad is None:
            self.head_VD.grad = with_local(self.head_VD, d_VD)
        else:
            local_part(self.head_VD.grad).add_(d_VD)
