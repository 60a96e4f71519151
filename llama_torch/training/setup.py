"""Build the model, the optimizer and the training run of a config."""

import dataclasses
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from llama_common.errors import InputError
from llama_common.memory import host_memory

from ..checkpoint.stored_weights import StoredWeights
from ..common.device import computes_bfloat16, pick_device, total_memory
from ..common.torchrun import local_process_count
from ..config import OptimConfig, RunConfig
from ..distributed.job import broadcast_object
from ..distributed.parallel import Parallel
from ..model.config import ModelConfig
from ..model.float8_linear import PAYS_FROM, use_float8
from ..model.llama import Llama
from . import run_dir
from .bad_steps import BadSteps
from .compile import compile_blocks
from .memory import Layout, require_run_memory
from .objective import Objective
from .optimizer import make_adamw
from .origin import Origin, find_origin
from .restore import restore
from .run_file import check_resume_config
from .run_length import record_length
from .source import BatchSource
from .task import Task
from .validate import Validation


@dataclass(frozen=True)
class Run:
    """Model, optimizer, data and parallel layout of one training run."""

    config: RunConfig  # its dtype and steps resolved
    device: torch.device
    parallel: Parallel
    source: BatchSource
    objective: Objective
    model: Llama
    optimizer: Optimizer
    is_compiled: bool
    steps_before: int  # the run's length before this start; config.steps unless --steps changed it
    steps_done: int  # training steps done before this process started
    skipped: list[int]  # steps, from 1, whose update was skipped; appended to during the run

    @property
    def n_parameters(self) -> int:
        """The number of the model's parameters, a tied one once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def multiplied(self) -> ModelConfig:
        """The model's config, tied only where the embedding multiplies as the head too."""
        return dataclasses.replace(self.config.model, tie_embeddings=not self.model.has_own_head)

    @property
    def compiling_step(self) -> int:
        """The step, from 1, that includes compilation; 0 = none."""
        return self.steps_done + 1 if self.is_compiled else 0

    @property
    def summary(self) -> str:
        """The model, its precision, device and step size, for people."""
        return (
            f"{self.n_parameters:,} parameters, {self.config.dtype}{self._fp8} on {self.device}, "
            f"{self.config.step_size}"
            + (f", begun from {self.config.init_from}" if self.config.init_from else "")
        )

    @property
    def _fp8(self) -> str:
        """The words for products in fp8, with a warning where they do not pay."""
        if self.config.precision != "fp8":
            return ""
        is_narrow = self.config.model.dim < PAYS_FROM
        slow = f", slower than bfloat16 below --dim {PAYS_FROM}" if is_narrow else ""
        return f" (block products in fp8{slow})"

    def train_windows(self) -> Generator[Tensor, None, None]:
        """Yield this process's training windows, [rows, ...], of each remaining step."""
        rank, world = self.parallel.data_rank, self.parallel.data_size
        return self.source.train_windows(self.steps_done, self.config.steps, rank, world)

    def bad_steps(self) -> BadSteps:
        """Return the check of every training step's loss and gradient norm."""
        config = self.config
        return BadSteps(
            self.objective.largest_loss(config.model.vocab_size),
            self.device,
            self.source.describe_step,
            self.skipped,
            skips=config.skip_bad_steps,
            parallel=self.parallel,
        )

    def validation(self) -> Validation:
        """Return the validation on held-out windows."""
        windows = self.source.validation_windows()
        to_batch, parallel = self.source.to_batch, self.parallel
        return Validation(self.model, windows, to_batch, parallel, self.objective)


def setup(config: RunConfig, exit_stack: ExitStack, task: Task | None = None) -> Run:
    """Build model, optimizer, data and parallel layout of a run; ``exit_stack`` holds its lock.

    The run directory is claimed, or with --resume restored from; a dry run does not touch it.
    Raises InputError for a config that cannot be run, before any long work. In a job the main
    process reads and writes the disk.
    """
    device, task = pick_device(config.device), task or Task()
    parallel = Parallel.from_config(config.parallel, device)
    config = with_precision(config, device)
    check_memory(config, device, parallel)
    resumes = config.resume and not config.dry_run
    if resumes and parallel.is_main_process:
        check_resume_config(config)
        exit_stack.enter_context(run_dir.lock(Path(config.out)))
    origin = broadcast_object(lambda: find_origin(config))
    source = task.open_source(config, origin, parallel)
    config = config.with_steps(source.steps)
    if resumes and parallel.is_main_process:
        check_resume_config(config, source.key)
    objective = task.make_objective(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    dtype: torch.dtype = getattr(torch, config.dtype)
    given = config.optim, config.seed, dtype, device, parallel
    with parallel.errors_on_main_only():
        model, optimizer = build(origin.model, *given, origin.directory, objective.model_class)
        task.begin(source, objective, model, parallel)
    steps_before, steps_done, skipped = config.steps, 0, list[int]()
    if not config.dry_run:
        steps_before, steps_done, skipped = claim_or_restore(
            config, source, origin, model, optimizer, parallel, exit_stack
        )
    parallel.wrap_ddp(model)
    if config.precision == "fp8":
        use_float8(model)
    return Run(
        config=config,
        device=device,
        parallel=parallel,
        source=source,
        objective=objective,
        model=model,
        optimizer=optimizer,
        is_compiled=compile_blocks(model, config.compile, config.recompute),
        steps_before=steps_before,
        steps_done=steps_done,
        skipped=skipped,
    )


def check_memory(config: RunConfig, device: torch.device, parallel: Parallel) -> None:
    """Raise InputError where a run surely does not fit; of several machines the smallest counts."""
    if config.verify_every:
        from .verify import require_memory  # imports the oracle

        require_memory(config.model)
    layout = Layout(
        config.parallel.fsdp or parallel.data_size,
        config.parallel.tp,
        parallel.data_size,
        local_process_count(),
    )
    host, gpu = -parallel.all_reduce_max(-host_memory()), None
    if device.type == "cuda":
        gpu = -parallel.all_reduce_max(-total_memory(device))
    with parallel.errors_on_main_only():
        require_run_memory(config, layout, host, gpu)


def with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the config with a device's dtype; InputError where it cannot be had.

    A run keeps the precision it began with, wherever it is resumed.
    """
    if config.precision == "fp8":
        require_fp8(device)
    dtype = pick_dtype(config.dtype, device)
    if config.optim.moments == "bfloat16":
        if dtype != "bfloat16":
            raise InputError(f"--moments bfloat16 needs --dtype bfloat16, got {dtype}")
        if (config.parallel.fsdp, config.parallel.tp) != (1, 1):
            raise InputError("--moments bfloat16 goes with neither --fsdp nor --tp; leave it out")
    return dataclasses.replace(config, dtype=dtype)


def pick_dtype(
    asked: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """Return the precision of weights and activations; auto: bfloat16 where it is computed."""
    if asked == "auto":
        return "bfloat16" if computes_bfloat16(device) else "float32"
    return asked


def require_fp8(device: torch.device) -> None:
    """Raise InputError where a GPU has no products in fp8; a CPU has them, slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"--precision fp8: {name} has no fp8 products; leave it out")


def build(
    config: ModelConfig,
    optim: OptimConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    parallel: Parallel | None = None,
    directory: Path | None = None,
    model_class: type[Llama] = Llama,
) -> tuple[Llama, Optimizer]:
    """Build the model and a fresh optimizer.

    The weights are those of the language model in ``directory``, else seeded random ones. Raises
    InputError for stored weights that do not fit ``config``, cannot be read or are not finite.
    """
    weights = StoredWeights(directory, config) if directory else None
    generator = torch.Generator().manual_seed(seed)
    if parallel and parallel.is_sharded:
        fill = weights.copy_into if weights else None
        model = parallel.build_sharded(config, dtype, generator, fill, model_class)
        return model, make_adamw(model, optim)
    model = model_class(config)
    names_of = {module: name for name, module in model.named_modules()}
    for part in model.parts():
        if weights is None or part in model.new_parts():
            model.init_part(part, generator)
        else:
            weights.copy_into(part, names_of[part])
    model.to(device)
    return model, make_adamw(model, optim, dtype)


def claim_or_restore(
    config: RunConfig,
    source: BatchSource,
    origin: Origin,
    model: Llama,
    optimizer: Optimizer,
    parallel: Parallel,
    exit_stack: ExitStack,
) -> tuple[int, int, list[int]]:
    """Claim a new run's directory, or restore the run in it.

    Returns the run's length before this start, the number of steps done, and the steps skipped.
    A changed length is written to the run's record. ``exit_stack`` holds the lock.
    """
    out = Path(config.out)
    if not config.resume and parallel.is_main_process:
        exit_stack.enter_context(run_dir.lock(out))
        run_dir.claim(config, source.key, origin, source.directory_files)
    run_dir.require_shared(out, parallel)
    if not config.resume:
        return config.steps, 0, []
    with parallel.errors_on_main_only():
        steps_done, skipped = restore(out, model, optimizer, parallel, origin.directory)
        is_main = parallel.is_main_process
        if is_main:
            run_dir.write_texts(out, source.directory_files)
        steps_before = record_length(config, steps_done) if is_main else config.steps
        return steps_before, steps_done, skipped
