"""Build the model, the optimizer and the run that a config asks for."""

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.optim import Optimizer

from ..common.device import computes_bfloat16
from ..common.errors import InputError
from ..common.torchrun import _processes
from ..config import TrainConfig
from ..data.corpus import Corpus, load_corpus
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from . import restore, run_dir
from .optimizer import make_adamw


def require_layout(config: TrainConfig) -> None:
    """Raise InputError where torchrun's processes cannot share a run as it is configured."""
    world = _processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fsdp, tp = config.parallel.fsdp, config.parallel.tp
    if world % tp:
        raise InputError(
            f"--tp {tp}: {world} {'process' if world == 1 else 'processes'} cannot be shared out "
            "so; choose a divisor of torchrun's --nproc-per-node (times --nnodes)"
        )
    if fsdp and world // tp % fsdp:
        raise InputError(
            f"--fsdp {fsdp}: --tp {tp} leaves {world // tp} of {world} processes; choose a divisor "
            "of that, such as --fsdp 1"
        )
    for name in ("n_heads", "n_kv_heads", "hidden_dim"):
        if getattr(config.model, name) % tp:
            raise InputError(
                f"--tp {tp} does not divide --{name.replace('_', '-')} "
                f"{getattr(config.model, name)}; choose a common divisor"
            )
    if config.batch_size * config.grad_accum % (world // tp):
        raise InputError(
            f"--batch-size times --grad-accum is {config.batch_size * config.grad_accum}, which "
            f"{world // tp} processes cannot share equally; choose a multiple"
        )
    if config.device != "cpu" and torch.cuda.is_available() and local > torch.cuda.device_count():
        raise InputError(
            f"torchrun's --nproc-per-node {local} is more than this machine's "
            f"{torch.cuda.device_count()} GPUs; start as many as it has"
        )
    if world > 1 and config.dry_run:
        raise InputError("--dry-run measures one process; start it without torchrun")
    if config.verify_every and (fsdp or world) * tp > 1:
        raise InputError("--verify-every compares whole models; leave it out, or --fsdp and --tp")


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the precision of weights and activations."""
    automatic = "bfloat16" if computes_bfloat16(device) else "float32"
    found: torch.dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
    return found


def set_up(
    config: TrainConfig, device: torch.device, parallel: Parallel | None = None
) -> tuple[Llama, Optimizer]:
    """Build the model with its seeded initial weights, and its optimizer."""
    torch.set_float32_matmul_precision(config.matmul_precision)
    generator, dtype = torch.Generator().manual_seed(config.seed), pick_dtype(config, device)
    if parallel and parallel.is_sharded:
        model = parallel.build(config.model, dtype, generator)
        return model, make_adamw(model, config.optim)
    model = Llama(config.model)
    model.init_weights(generator)
    model.to(device)
    return model, make_adamw(model, config.optim, dtype)


def prepare(
    config: TrainConfig, device: torch.device, parallel: Parallel, held: ExitStack
) -> tuple[Corpus, Llama, Optimizer, int, list[int]]:
    """Load text, model and optimizer, and claim or restore the run, whose lock ``held`` keeps.

    Returns the number of steps done and those skipped too. What can be refused is refused
    before the work that it would waste. In a job the first process speaks to the disk.
    """
    out = Path(config.out)
    if config.resume and parallel.is_main_process:
        run_dir.require_same(config)
        held.enter_context(run_dir.lock(out))
    with parallel.main_process_first():
        corpus = load_corpus(config.data, config.model.vocab_size, config.model.max_seq_len)
    if config.resume and parallel.is_main_process:
        run_dir.require_same(config, corpus.key)
    model, optimizer = set_up(config, device, parallel)
    start, skipped = 0, list[int]()
    if not config.resume and parallel.is_main_process:
        held.enter_context(run_dir.lock(out))
        run_dir.claim(config, corpus.key)
    run_dir.require_shared(out, parallel)
    if config.resume:
        with parallel.errors_on_main_only():
            start, skipped = restore.restore(out, model, optimizer, parallel)
    parallel.replicate(model)
    return corpus, model, optimizer, start, skipped
