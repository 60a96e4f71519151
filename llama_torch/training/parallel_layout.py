"""Check that torchrun's processes fit a run's config, before any of them imports torch."""

import os

from llama_common.errors import InputError, flag_of

from ..common.torchrun import process_count
from ..config import RunConfig


def check_parallel_layout(config: RunConfig) -> None:
    """Raise InputError where torchrun's processes do not fit the configured parallel layout."""
    world = process_count()
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
                f"--tp {tp} does not divide {flag_of(name)} {getattr(config.model, name)}; choose "
                "a common divisor"
            )
    if config.batch_size * config.grad_accum % (world // tp):
        raise InputError(
            f"--batch-size times --grad-accum is {config.batch_size * config.grad_accum}, which "
            f"{world // tp} processes cannot share equally; choose a multiple"
        )
    if config.device != "cpu" and local > 1:
        _require_gpus(local)
    if world > 1 and config.dry_run:
        raise InputError("--dry-run measures one process; start it without torchrun")
    if config.verify_every and (fsdp or world) * tp > 1:
        raise InputError("--verify-every compares whole models; leave it out, or --fsdp and --tp")


def _require_gpus(processes: int) -> None:
    """Raise InputError where this machine has fewer GPUs than processes, but not none."""
    import torch  # late, as one process needs it to say nothing here

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise InputError(
            f"torchrun's --nproc-per-node {processes} is more than this machine's "
            f"{torch.cuda.device_count()} GPUs; start as many as it has"
        )
