"""Count the bytes that a training step moves between processes, by arithmetic.

What is counted is what ``llama_torch.distributed.parallel`` asks of torch; the suite compares it
with the calls of a small job.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from llama_torch.model.config import ModelConfig
from llama_torch.model.shapes import HEAD, block_shapes, outer_shapes

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
FORWARD, BACKWARD, ALONE = "forward", "backward", "alone"

SUM_WIDTH = 4  # bytes of a gradient while it is reduced: float32
BUCKET_BYTES = 25 << 20  # of gradients that DDP reduces in one call, in their own dtype

# Gathers of the residual stream, sharded by positions, in a block: before the attention's and the
# feed-forward's first products, and of the gradient of what their last ones made. Scatters of sums
# are as many.
GATHERS_IN_BLOCK = 4
# And of the whole model: the head's input, and the gradient of the embedding's output.
GATHERS_AROUND = 2


class Mesh(NamedTuple):
    """How processes share a step: replicas of groups that share weights, of groups of --tp."""

    replicas: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.replicas * self.fsdp * self.tp


class Transfer(NamedTuple):
    """Equal collective calls of one step."""

    kind: str  # all_reduce, all_gather or reduce_scatter
    axis: str  # of the mesh
    processes: int  # that take part
    n_bytes: float  # of the whole tensor, in each call; on average
    calls: int
    during: str  # the pass whose products it runs beside; alone: beside none

    @property
    def steps(self) -> int:
        """The steps of a call around a ring, in each of which a process sends one part."""
        return (self.processes - 1) * (2 if self.kind == "all_reduce" else 1)

    @property
    def sent(self) -> float:
        """The bytes that each process sends, all calls together."""
        return self.calls * self.n_bytes * self.steps / self.processes


def transfers(
    config: ModelConfig, mesh: Mesh, tokens: int, micro_batches: int = 1, width: int = 2
) -> list[Transfer]:
    """Return the collective calls of a training step between two processes or more.

    tokens         of one micro-batch of a data-parallel rank: a replica's, a shard's, or those of a
                   group of --tp.
    micro_batches  forward and backward passes of a data-parallel rank in the step.
    width          bytes of a weight and of an activation as they are computed with.
    """
    if mesh.fsdp * mesh.tp == 1:
        found = _replicas(config, mesh.replicas, micro_batches, width)
    else:
        found = _shards(config, mesh, micro_batches, width)
    tensor = _tensor(config, mesh.tp, tokens, micro_batches, width)
    return [one for one in (*found, *tensor) if one.processes > 1]


def _replicas(
    config: ModelConfig, replicas: int, micro_batches: int, width: int
) -> Iterator[Transfer]:
    """Yield DDP's: every gradient is reduced in float32, once a step.

    It is reduced in the backward pass; where bfloat16 micro-batches are added up, after it.
    """
    sizes = {name: math.prod(shape) for name, shape in outer_shapes(config).items()}
    head = sizes.pop(HEAD, 0)
    blocks = config.n_layers * sum(map(math.prod, block_shapes(config).values()))
    rest = sum(sizes.values()) + blocks
    during, calls = BACKWARD, max(1, -(-width * rest // BUCKET_BYTES))
    if width < SUM_WIDTH and micro_batches > 1:
        during, calls = ALONE, len(sizes) + config.n_layers * len(block_shapes(config))
    yield Transfer("all_reduce", REPLICATE, replicas, SUM_WIDTH * rest / calls, calls, during)
    if head:
        yield Transfer("all_reduce", REPLICATE, replicas, SUM_WIDTH * head, 1, during)


def _shards(config: ModelConfig, mesh: Mesh, micro_batches: int, width: int) -> Iterator[Transfer]:
    """Yield FSDP2's: a block's weights are gathered in each pass, its gradient is scattered once.

    Embedding, last norm and head are gathered once for both passes, before the first product, and
    their gradient is scattered after the last one.
    """
    block, outer = (
        sum(math.prod(shape) // (mesh.tp if len(shape) > 1 else 1) for shape in shapes.values())
        for shapes in (block_shapes(config), outer_shapes(config))
    )
    layers = config.n_layers
    for during in (FORWARD, BACKWARD):
        calls = layers * micro_batches
        yield Transfer("all_gather", SHARD, mesh.fsdp, width * block, calls, during)
    yield Transfer("all_gather", SHARD, mesh.fsdp, width * outer, micro_batches, ALONE)
    for size, calls, during in (block, layers, BACKWARD), (outer, 1, ALONE):
        yield Transfer("reduce_scatter", SHARD, mesh.fsdp, SUM_WIDTH * size, calls, during)
        share = SUM_WIDTH * size // mesh.fsdp
        yield Transfer("all_reduce", REPLICATE, mesh.replicas, share, calls, during)


def _tensor(
    config: ModelConfig, tp: int, tokens: int, micro_batches: int, width: int
) -> Iterator[Transfer]:
    """Yield those of --tp, none of which runs beside products.

    They are the residual stream's, the three numbers in float32 of each token's logits that a loss
    takes of each process (here in one call), and the gradients of norms, once a step.
    """
    calls = micro_batches * (GATHERS_IN_BLOCK * config.n_layers + GATHERS_AROUND)
    for kind in ("all_gather", "reduce_scatter"):
        yield Transfer(kind, TENSOR, tp, width * tokens * config.dim, calls, ALONE)
    yield Transfer("all_gather", TENSOR, tp, 3 * 4 * tokens * tp, micro_batches, ALONE)
    norms, norm_width = 2 * config.n_layers + 1, SUM_WIDTH if micro_batches > 1 else width
    yield Transfer("all_reduce", TENSOR, tp, norm_width * config.dim, norms, ALONE)
