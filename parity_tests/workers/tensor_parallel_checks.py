"""One process of test_tensor_parallel.py's jobs.

``... -m parity_tests.workers.tensor_parallel_checks IN OUT``: IN is a pickled dict of the arguments
of CHECKS' functions by name. The first process pickles their results, by the same names, to OUT.
"""

import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_torch.checkpoint.shards import StateShards
from llama_torch.common.sharded_tensor import is_sharded
from llama_torch.common.torchrun import exit_process
from llama_torch.config import ParallelConfig
from llama_torch.distributed.job import job
from llama_torch.distributed.parallel import Parallel
from llama_torch.model import loss
from llama_torch.training import compile as compile_module

from ..backends.torch_model import torch_config
from ..conformance.strategies import Params
from ..conformance.training_cases import TrainingCase
from ..plugins import poison
from ..support.torch_training import Trained
from . import distributed_steps
from .distributed_steps import Layout
from .tensor_parallel_faults import FAULTS


class LossCase(NamedTuple):
    """Sizes of a loss, and how widely its logits spread."""

    vocab_size: int
    z_loss: float = 0.0
    spread: float = 1.0
    dtype: str = "float64"
    rows_of_chunk: int = 5
    has_targets: bool = True


class Loss(NamedTuple):
    """A loss and its gradients."""

    loss: float
    validation: float  # the loss by loss_sum
    d_head: Tensor
    d_hidden: Tensor


def losses(cases: Sequence[LossCase]) -> list[tuple[Loss, Loss]]:
    """Return each case's loss on all processes, and on one."""
    return [(loss_of(case, shared=True), loss_of(case, shared=False)) for case in cases]


def loss_of(case: LossCase, shared: bool) -> Loss:
    """Return a case's loss; if ``shared``, with its vocabulary and positions sharded."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    n_processes, dim = dist.get_world_size(), 6
    hidden = torch.randn(2, 8, dim, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(case.vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)
    head *= case.spread
    targets = torch.randint(case.vocab_size, (2, 8), generator=generator)
    edge = -(-case.vocab_size // n_processes)  # the first row of the second process
    targets[0, :5] = torch.tensor([0, edge - 1, edge, case.vocab_size - 1, loss.IGNORE_INDEX])
    if not case.has_targets:
        targets.fill_(loss.IGNORE_INDEX)
    if shared:
        head = distribute_tensor(head, init_device_mesh("cpu", (n_processes,)), [Shard(0)])
    hidden, head = hidden.requires_grad_(), nn.Parameter(head)
    row_bytes = case.vocab_size * dtype.itemsize // (n_processes if shared else 1)
    with patch.object(loss, "CHUNK_BYTES", case.rows_of_chunk * row_bytes):
        made = loss.backward_loss(hidden, head, targets, 7.0, case.z_loss)
        validation = loss.loss_sum(hidden, head, targets, case.z_loss) / 7
    assert hidden.grad is not None
    d_hidden = hidden.grad.double()
    if shared:  # of this process's logits alone
        dist.all_reduce(d_hidden)
    return Loss(made.item(), validation.item(), whole(head.grad), d_hidden)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, gathered if it is sharded."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().double()


def faults(names: Sequence[str], case: TrainingCase) -> dict[str, Trained]:
    """Return one step's results with each of the faults, by name; "" = with none."""
    found = {}
    for name in ("", *names):
        with ExitStack() as stack:
            if name:
                FAULTS[name](stack)
            found[name], _ = distributed_steps.train(tensor_layout(1), case)
    return found


def tensor_layout(steps: int) -> Layout:
    """Return the layout in which all processes share the products."""
    return Layout(1, dist.get_world_size(), steps=steps)


COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


class Counting(TorchDispatchMode):
    """Counts the collective calls, and the bytes that each process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        tensors = [x for x in args if isinstance(x, Tensor)]
        if namespace == "_c10d_functional" and name in COLLECTIVES:
            self.calls[name] += 1
            self.given[name] += sum(x.numel() * x.itemsize for x in tensors)
        return func(*args, **(kwargs or {}))


def collectives(case: TrainingCase) -> tuple[dict[str, int], dict[str, int], int]:
    """Return calls and bytes of a step's functional collectives, and its widest row of logits."""
    widths, counting = [0], Counting()
    real_logits, real_step = loss._logits, distributed_steps.train_step

    def logits(*args: Tensor) -> Tensor:
        made = real_logits(*args)
        widths.append(made.shape[-1])
        return made

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with counting:
            return real_step(*args, **kwargs)

    with (
        patch.object(loss, "_logits", logits),
        patch.object(distributed_steps, "train_step", train_step),
    ):
        distributed_steps.train(tensor_layout(1), case)
    return dict(counting.calls), dict(counting.given), max(widths)


def compiled(case: TrainingCase) -> Trained:
    """Return the results of steps with compiled blocks that recompute cheap activations."""
    with ExitStack() as stack:
        # The partitioner that a GPU's compiler uses, without its code generation.
        by = partial(torch.compile, backend="aot_eager_decomp_partition")
        stack.enter_context(patch.object(torch, "compile", by))
        stack.enter_context(patch.object(compile_module, "can_compile", lambda device: True))
        real = distributed_steps.build

        def build(parallel: Parallel, *rest: Any) -> Any:
            model, optimizer = real(parallel, *rest)
            assert compile_module.compile_blocks(model, "yes", "cheap")
            return model, optimizer

        stack.enter_context(patch.object(distributed_steps, "build", build))
        return distributed_steps.train(tensor_layout(2), case)[0]


def checkpoint(case: TrainingCase, folder: Path) -> dict[str, Params]:
    """Return the parameters of a checkpoint as one process, and as the processes of --tp, read it.

    Half of the processes share the products, and pairs of these the shards, that are written.
    """
    state = {layout: parameters(layout, case) for layout in (Layout(2, 2), Layout(1, 4))}
    shards = StateShards(folder)
    shards.write(state[Layout(2, 2)])
    dist.barrier()
    read = {
        "one": shards.read_whole(state[Layout(2, 2)]),
        "another layout": shards.read_like(state[Layout(1, 4)]),
    }
    return {
        name: {key: whole(tensor).numpy() for key, tensor in tensors.items()}
        for name, tensors in read.items()
    }


def parameters(layout: Layout, case: TrainingCase) -> dict[str, Tensor]:
    """Return the case's parameters in float32, sharded by a layout."""
    torch.set_default_dtype(torch.float32)
    sizes = ParallelConfig(layout.fsdp, layout.tp)
    parallel = Parallel.from_config(sizes, torch.device("cpu"))
    init_part = distributed_steps.init_from(case)
    with patch.object(distributed_steps.Llama, "init_part", init_part):
        config = torch_config(case.config)
        model = parallel.build_sharded(config, torch.float32, torch.Generator())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


CHECKS = {
    "checkpoint": checkpoint,
    "losses": losses,
    "faults": faults,
    "collectives": collectives,
    "compiled": compiled,
}


def main() -> int:
    poison.install_if_asked()
    torch.set_num_threads(1)
    asked = pickle.loads(Path(sys.argv[1]).read_bytes())
    with job():
        found = {name: CHECKS[name](*given) for name, given in asked.items()}
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_bytes(pickle.dumps(found))
        dist.barrier()
    return 0


if __name__ == "__main__":
    exit_process(main)
