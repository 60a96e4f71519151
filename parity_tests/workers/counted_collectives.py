"""Count the collective calls of training steps, and their bytes, in the processes of one job.

``... -m parity_tests.workers.counted_collectives IN OUT``: IN is a pickled list of Step. Each takes
three steps in bfloat16, of which the last is counted, and the first process pickles a list of
Call for each to OUT.
"""

import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_torch.common.torchrun import exit_process
from llama_torch.config import OptimConfig, ParallelConfig
from llama_torch.distributed.job import job
from llama_torch.distributed.parallel import Parallel
from llama_torch.model.config import ModelConfig
from llama_torch.training.batch import to_batch
from llama_torch.training.setup import build
from llama_torch.training.step import train_step

# What the calls do, by the beginning of an operator's name in torch.
KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather": "all_gather",
    "all_gather": "all_gather",
    "_reduce_scatter": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
}


class Step(NamedTuple):
    """A training step of a model, in a layout, of micro-batches of ``rows`` windows a data rank."""

    model: ModelConfig
    fsdp: int
    tp: int
    rows: int
    micro_batches: int


class Call(NamedTuple):
    """One collective call: what it does, among how many, and the bytes of the whole tensor."""

    kind: str
    processes: int
    n_bytes: int


class Counting(TorchDispatchMode):
    """Notes this process's collective calls, of whichever of torch's APIs, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        space, name = op._schema.name.split("::")
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
        if "c10d" in space and kind:
            # Of a part and the whole, which are the input and the output of most calls.
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.append(Call(kind, group_size(args), whole))
        return result


def group_size(args: Sequence[Any]) -> int:
    """Return the number of processes of the group that a call was given, as an object or a name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return int(dist.ProcessGroup.unbox(arg).size())
    return int(dist.distributed_c10d._resolve_process_group(args[-1]).size())


def count(step: Step) -> list[Call]:
    """Return the collective calls of a layout's third step."""
    parallel = Parallel.from_config(ParallelConfig(step.fsdp, step.tp), torch.device("cpu"))
    given = OptimConfig(), 0, torch.bfloat16, torch.device("cpu"), parallel
    model, optimizer = build(step.model, *given)
    parallel.wrap_ddp(model)
    shape = step.rows, step.model.max_seq_len + 1
    windows = torch.randint(step.model.vocab_size, shape)
    batches = [to_batch(windows) for _ in range(step.micro_batches)]
    counting = Counting()
    for mode in (nullcontext(), nullcontext(), counting):  # in the second DDP forms its buckets
        with mode:
            train_step(model, optimizer, batches, lr=1e-3, grad_clip=1.0, parallel=parallel)
    return counting.calls


def main() -> int:
    torch.set_num_threads(1)
    steps = pickle.loads(Path(sys.argv[1]).read_bytes())
    with job():
        found = [count(step) for step in steps]
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_bytes(pickle.dumps(found))
        dist.barrier()
    return 0


if __name__ == "__main__":
    exit_process(main)
