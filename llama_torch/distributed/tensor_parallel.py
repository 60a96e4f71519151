"""Shard the parts of a model over the processes of ``--tp``.

Each process has its heads and hidden units of every block, and its rows of the vocabulary in the
embedding and the head (Shoeybi et al. 2019, section 3). Between products the residual stream is
sharded by positions (Korthikanti et al. 2022, section 4.2.2): it is gathered before a block's first
products, and the sum that its last products make is scattered. The norms' weights are whole, and
their gradients are sums over the processes' positions, which FSDP2 takes.

A vocabulary that does not divide leaves the last processes fewer rows; there are no padding rows.
Windows that do not divide get padding positions, which no other position sees.

Suffixes: B batch, T query position, V vocabulary, D dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..common.sharded_tensor import is_sharded
from ..model.embedding import Embedding, embed
from ..model.llama import Block, Llama
from ..model.masks import Documents, Mask
from ..model.vocab_part import VocabPart

BY_POSITION = Shard(1)  # of [B, T, D]


def shard_part(part: nn.Module, mesh: DeviceMesh) -> None:
    """Shard one of ``Llama.parts()``, which every process of the mesh holds whole, in place."""
    if isinstance(part, Block):
        parallelize_module(part, mesh, _block_plan())
    elif isinstance(part, nn.RMSNorm):
        parallelize_module(part, mesh, SequenceParallel())  # its output is a DTensor
    else:
        assert isinstance(part, Embedding | nn.Linear)
        if len(part.weight) == 1:
            return  # a reward model's head, which each process computes for itself
        part.weight = nn.Parameter(distribute_tensor(part.weight, mesh, [Shard(0)]))
        if isinstance(part, Embedding):
            part.look_up = _embed_part


def forward_hidden(
    model: Llama,
    mesh: DeviceMesh,
    tokens_BT: Tensor,
    positions_BT: Tensor | None,
    mask: Mask | None,
) -> Tensor:
    """Return the last hidden states [B, T, D] of all positions, after the final norm.

    Where the rows of the model's head are sharded, the gradient given to them is that of this
    process's logits; the sum over the processes is taken on the way back.
    """
    length = tokens_BT.shape[1]
    given = _padded(-length % mesh.size(), tokens_BT, positions_BT, mask)
    tokens_BT, positions_BT, mask = given
    hidden, _ = model(tokens_BT, positions=positions_BT, mask=mask, project=False)
    assert is_sharded(hidden)
    gradient = Partial() if is_sharded(model.head_weight) else Replicate()
    whole = hidden.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[gradient])[:, :length]


def _padded(
    n: int, tokens_BT: Tensor, positions_BT: Tensor | None, mask: Mask | None
) -> tuple[Tensor, Tensor | None, Mask | None]:
    """Return tokens, positions and mask with ``n`` positions more, which no other one sees."""
    if n == 0:
        return tokens_BT, positions_BT, mask
    if positions_BT is not None:
        positions_BT = F.pad(positions_BT, (0, n))
    if isinstance(mask, Documents):
        mask = mask.padded(len(tokens_BT), n)
    elif mask is not None:  # else it is causal, and hides what follows
        mask = F.pad(mask, (0, n, 0, n))
        mask[:, -n:, -n:] = torch.eye(n, dtype=torch.bool, device=mask.device)
    return F.pad(tokens_BT, (0, n)), positions_BT, mask


def _block_plan() -> dict[str, Any]:
    """Return the layouts of a block's modules."""
    first = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    last = ("self_attn.o_proj", "mlp.down_proj")
    return {
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), SequenceParallel()),
        # One gathered input for all products of a module: its gradient is scattered once.
        "self_attn": _gathers_first_of(6),
        "mlp": _gathers_first_of(2),
        **dict.fromkeys((*first, "mlp.gate_proj", "mlp.up_proj"), ColwiseParallel()),
        **dict.fromkeys(last, RowwiseParallel(output_layouts=BY_POSITION)),
    }


def _gathers_first_of(n_arguments: int) -> PrepareModuleInput:
    """Return the layout of a module whose first argument is sharded by positions."""
    others = [None] * (n_arguments - 1)
    return PrepareModuleInput(
        input_layouts=(BY_POSITION, *others), desired_input_layouts=(Replicate(), *others)
    )


def _embed_part(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """Return embeddings of this process's positions of tokens [B, T], of its rows of the weight.

    A process looks up the tokens of its own rows, and has zeros for all others: the sum over the
    processes is exact.
    """
    assert isinstance(weight_VD, DTensor)
    row_BT, is_here_BT = VocabPart(weight_VD).columns(tokens_BT)
    terms_BTD = embed(row_BT, weight_VD.to_local()).masked_fill(~is_here_BT[..., None], 0)
    terms = DTensor.from_local(terms_BTD, weight_VD.device_mesh, [Partial()])
    return terms.redistribute(placements=[BY_POSITION]).to_local()
