"""One process of test_parallel.py's distributed training jobs.

``torchrun ... -m parity_tests.workers.distributed_steps IN OUT``: IN is a pickled list of (Layout,
TrainingCase). Each case is trained for its layout's steps, its batches split between the
processes, and the first process pickles the results to OUT.
"""

import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama_torch.common.sharded_tensor import local_part
from llama_torch.common.torchrun import exit_process
from llama_torch.config import OptimConfig, ParallelConfig
from llama_torch.distributed.job import job
from llama_torch.distributed.parallel import Parallel
from llama_torch.model.llama import Llama
from llama_torch.training.objective import TokenLoss
from llama_torch.training.optimizer import learning_rate, make_adamw
from llama_torch.training.step import train_step

from ..backends.torch_backends import optim_config, to_torch
from ..backends.torch_model import torch_config
from ..conformance.training_cases import TrainingCase
from ..plugins import poison
from ..support.torch_training import Trained

STEPS = 3


class Layout(NamedTuple):
    """The parallel layout, the weights' dtype and the number of steps of one training."""

    fsdp: int
    tp: int
    dtype: str = "float64"
    steps: int = STEPS


def train(layout: Layout, case: TrainingCase) -> tuple[Trained, dict[str, int]]:
    """Return the results of a layout's steps, and this process's elements of each parameter."""
    dtype, settings = getattr(torch, layout.dtype), optim_config(case.hyper)
    torch.set_default_dtype(torch.float32 if dtype == torch.bfloat16 else dtype)
    config = torch_config(case.config)
    parallel = Parallel.from_config(ParallelConfig(layout.fsdp, layout.tp), torch.device("cpu"))
    Llama.init_part = init_from(case)  # type: ignore[method-assign]
    model, optimizer = build(parallel, config, dtype, settings)
    per_rank = len(case.batches) // parallel.data_size
    own_batches = case.batches[parallel.data_rank * per_rank :][:per_rank]
    losses, norms = [], []
    for i in range(layout.steps):
        loss, norm = train_step(
            model,
            optimizer,
            [to_torch(batch) for batch in own_batches],
            lr=learning_rate(i, case.hyper.steps, settings),
            grad_clip=settings.grad_clip,
            objective=TokenLoss(case.hyper.z_loss),
            parallel=parallel,
        )
        losses.append(loss.item())
        norms.append(norm.item())
    named = dict(model.named_parameters())
    local_sizes = {name: local_part(p).numel() for name, p in named.items()}
    state = {n: optimizer.state[p] for n, p in named.items()}
    moments = ({n: whole(s[kind]) for n, s in state.items()} for kind in ("exp_avg", "exp_avg_sq"))
    return Trained(losses, norms, {n: whole(p) for n, p in named.items()}, *moments), local_sizes


def build(parallel: Parallel, config: Any, dtype: torch.dtype, settings: OptimConfig) -> Any:
    """Return model and optimizer as the trainer builds them."""
    generator = torch.Generator()
    if parallel.is_sharded:
        model = parallel.build_sharded(config, dtype, generator)
        return model, make_adamw(model, settings)
    model = Llama(config)
    model.init_weights(generator)
    optimizer = make_adamw(model, settings, dtype)
    parallel.wrap_ddp(model)
    return model, optimizer


def init_from(case: TrainingCase) -> Any:
    """Return a replacement of ``Llama.init_part`` that copies the case's weights."""

    def init_part(model: Llama, part: nn.Module, generator: torch.Generator) -> None:
        (prefix,) = (name for name, module in model.named_modules() if module is part)
        for name, weight in part.named_parameters():
            with torch.no_grad():
                weight.copy_(torch.from_numpy(case.params[f"{prefix}.{name}"]))

    return init_part


def whole(tensor: Tensor) -> np.ndarray:
    """Return a tensor in float64, gathered if it is sharded."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().double().numpy().copy()


def main() -> int:
    poison.install_if_asked()
    torch.set_num_threads(1)
    cases = pickle.loads(Path(sys.argv[1]).read_bytes())
    with job():
        found = [train(layout, case) for layout, case in cases]
        if torch.distributed.get_rank() == 0:
            Path(sys.argv[2]).write_bytes(pickle.dumps(found))
        torch.distributed.barrier()
    return 0


if __name__ == "__main__":
    exit_process(main)
