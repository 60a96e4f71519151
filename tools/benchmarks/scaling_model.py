"""Predict the speed of training on many GPUs from one GPU's, and from the speed of the links.

What is assumed, and fitted to no run of several GPUs:

- One GPU's tokens/s is measured. Products take as long beside others: what a collective call takes
  of a GPU's multiprocessors and memory does not slow them. A forward pass is a third of a step.
- A call goes around a ring at the links' full speed. Each GPU has its own network card, and a ring
  between hosts uses those of all its GPUs.
- A step around the ring takes the latency by which NCCL itself chooses (its tuning.cc: ring,
  Simple). An all-reduce takes a tree where the latency of that is less.
- Best case: blocks' weights and gradients move beside the products of their pass, and only what
  does not fit beside them is waited for. Those of embedding and head, and the sums of --tp, always
  are. Worst case: whatever moves is waited for.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llama_torch.model.config import ModelConfig

from ..shapes import SHAPES
from .communication import ALONE, BACKWARD, FORWARD, SHARD, TENSOR, Mesh, Transfer, transfers

STEP_SECONDS = 3.4e-6  # of a ring's step over NVLink
STEP_SECONDS_BETWEEN_HOSTS = 14e-6
TREE_SECONDS = 4e-6  # of a tree's step over NVLink; between hosts as a ring's

FORWARD_SHARE = 1 / 3  # of a training step's operations


class Machines(NamedTuple):
    """Hosts of GPUs; speeds in bytes per second, each way, of one GPU."""

    per_host: int = 8
    nvlink: float = 450e9
    network: float = 50e9


class Work(NamedTuple):
    """A model, the windows that each GPU has of a step, and the speed of one GPU alone."""

    model: ModelConfig
    windows: int
    speed: float  # tokens per second

    @property
    def tokens(self) -> int:
        """The tokens of a step for each GPU."""
        return self.windows * self.model.max_seq_len


class Prediction(NamedTuple):
    """What is predicted of a step."""

    mesh: Mesh
    sent: dict[str, float]  # bytes that a GPU sends, by axis of the mesh
    seconds: float  # of a step in the best case
    moving: float  # seconds of it in which bytes move
    speed: float  # tokens per second of all GPUs, in the best case
    worst_speed: float  # and in the worst


def predict(work: Work, mesh: Mesh, machines: Machines) -> Prediction:
    """Return the prediction of a step of one micro-batch, on the processes of a mesh."""
    moved = transfers(work.model, mesh, work.tokens * mesh.tp)
    seconds = dict.fromkeys((FORWARD, BACKWARD, ALONE), 0.0)
    sent: dict[str, float] = {}
    for one in moved:
        seconds[one.during] += seconds_of(one, mesh, machines)
        sent[one.axis] = sent.get(one.axis, 0.0) + one.sent
    products = work.tokens / work.speed
    beside = {FORWARD: FORWARD_SHARE * products, BACKWARD: (1 - FORWARD_SHARE) * products}
    waiting = sum(max(0.0, taken - beside.get(during, 0.0)) for during, taken in seconds.items())
    tokens, moving, best = mesh.size * work.tokens, sum(seconds.values()), products + waiting
    return Prediction(mesh, sent, best, moving, tokens / best, tokens / (products + moving))


def seconds_of(transfer: Transfer, mesh: Mesh, machines: Machines) -> float:
    """Return the seconds of a transfer's calls, one after the other."""
    inner = {TENSOR: 1, SHARD: mesh.tp}.get(transfer.axis, mesh.tp * mesh.fsdp)
    in_host = min(transfer.processes, max(1, machines.per_host // inner))
    hosts = -(-transfer.processes // in_host)
    speed = machines.nvlink if hosts == 1 else min(machines.nvlink, in_host * machines.network)
    passes = 2 if transfer.kind == "all_reduce" else 1
    between = passes * (hosts - 1)
    latency = (transfer.steps - between) * STEP_SECONDS + between * STEP_SECONDS_BETWEEN_HOSTS
    if transfer.kind == "all_reduce":
        levels = math.ceil(math.log2(hosts))
        tree = (in_host - 1) * TREE_SECONDS + levels * STEP_SECONDS_BETWEEN_HOSTS
        latency = min(latency, passes * tree)
    return transfer.calls * latency + transfer.sent / speed


class Measured(NamedTuple):
    """A measured speed, beside which the model's prediction is shown."""

    shape: str
    windows: int  # of each GPU
    alone: float  # tokens/s of one GPU
    mesh: Mesh
    speed: float  # tokens/s of all


# H200 with NVLink in one host, bfloat16. The speed of one is of the same run, but for 7B: of the
# run in docs/performance.md.
MEASURED = (
    Measured("1.1b", 8, 76_477, Mesh(replicas=2), 146_605),
    Measured("1.1b", 8, 74_000, Mesh(replicas=4), 255_500),
    Measured("1.1b", 8, 74_000, Mesh(fsdp=4), 268_900),
    Measured("7b", 1, 11_704, Mesh(fsdp=4), 45_400),
)


def predicted(row: Measured) -> Prediction:
    """Return the prediction for a measured row."""
    return predict(Work(SHAPES[row.shape], row.windows, row.alone), row.mesh, Machines())


def meshes(model: ModelConfig, gpus: int, per_host: int) -> Sequence[Mesh]:
    """Return the usual meshes of so many GPUs, those with --tp within a host."""
    local = math.gcd(gpus, per_host)
    tp = math.gcd(model.n_kv_heads, model.hidden_dim, local)
    found = [Mesh(replicas=gpus), Mesh(fsdp=gpus)]
    found.append(Mesh(replicas=gpus // local, fsdp=local))
    found.append(Mesh(fsdp=gpus // tp, tp=tp))
    return list(dict.fromkeys(found))
