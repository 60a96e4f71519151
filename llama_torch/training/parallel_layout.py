"""Fit a run's parallel layout to torchrun's processes, before any of them imports torch."""

import math
import os
import sys
from collections.abc import Collection

from llama_common.errors import InputError, flag_of
from llama_common.settings import Settings, build

from ..common.torchrun import is_restarted, process_count
from ..config import ParallelConfig, RunConfig


def fit_layout(
    began: ParallelConfig, asked: ParallelConfig, given: Collection[str]
) -> ParallelConfig:
    """Return the layout for this job's processes that is nearest to the one a run began with.

    The fields named in ``given`` stay as they are asked for, whether they fit or not. --tp is the
    largest common divisor of what it was and the number of processes. --fsdp is the smallest
    number of shards that leaves no process with more of the model than before, or all there are.
    """
    world = process_count()
    tp = asked.tp if "tp" in given else math.gcd(began.tp, world)
    if "fsdp" in given or not began.fsdp:  # 0 = all that --tp leaves
        return ParallelConfig(asked.fsdp if "fsdp" in given else 0, tp)
    left = max(world // tp, 1)
    needed = -(-began.fsdp * began.tp // tp)
    enough = (n for n in range(min(needed, left), left + 1) if left % n == 0)
    return ParallelConfig(next(enough), tp)


def resumed_layout(
    asked: ParallelConfig, stored: Settings, given: Collection[str]
) -> ParallelConfig:
    """Return the layout of a resumed run, and print it where it is not the one that it began with.

    Fields that flags or a file gave, ``given``, are asked for; but torchrun, which may restart a
    job on fewer machines, does so with the flags that it began with.
    """
    began = build(ParallelConfig, stored)
    if is_restarted():
        began, given = asked, ()
    layout = fit_layout(began, asked, given)
    if layout != began:
        world = process_count()
        print(
            f"note: --resume continues on {world} {'process' if world == 1 else 'processes'} with "
            f"{_flags(layout)} instead of {_flags(began)}",
            file=sys.stderr,
        )
    return layout


def _flags(layout: ParallelConfig) -> str:
    """Return the flags of a layout."""
    return f"--fsdp {layout.fsdp} --tp {layout.tp}"


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
    if -(-config.model.vocab_size // tp) * (tp - 1) >= config.model.vocab_size:
        raise InputError(
            f"--tp {tp} leaves its last process no row of --vocab-size {config.model.vocab_size}; "
            "choose a smaller one"
        )
    if config.batch_size * config.grad_accum % (world // tp):
        shared = f"{world // tp} processes" if tp == 1 else f"{world // tp} groups of --tp {tp}"
        raise InputError(
            f"--batch-size times --grad-accum is {config.batch_size * config.grad_accum}, which "
            f"{shared} cannot share equally; "
            + ("start a number that divides it" if config.resume else "choose a multiple")
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
