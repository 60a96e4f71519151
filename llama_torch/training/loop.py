"""The training loop: training steps, periodic actions after them, and stopping at a signal."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from ..common.torchrun import is_launched
from ..config import RunConfig
from . import periodic
from .bad_steps import BadSteps
from .clock import TrainingClock
from .objective import Measured
from .optimizer import learning_rate
from .periodic import Periodic, StepResult
from .profiler import profiling
from .progress import NullProgress, Progress, open_progress
from .saver import Saver, make_saver
from .setup import Run, setup
from .signals import Stop, Stopped, signals
from .step import train_step
from .task import Task
from .validate import Validation


def train(config: RunConfig, task: Task | None = None) -> Measured:
    """Train or resume the run of ``config``; return what the last validation measured.

    Raises Stopped when SIGINT or SIGTERM ends the run before its last step, and InputError for
    what the user can mend.
    """
    with ExitStack() as exit_stack:
        stop = exit_stack.enter_context(signals(signals_are_duplicated=is_launched()))
        run = setup(config, exit_stack, task)
        windows = run.train_windows()
        validation = run.validation()
        bad_steps = run.bad_steps()
        saver = make_saver(
            Path(run.config.out),
            run.model,
            run.optimizer,
            run.parallel,
            run.config.keep_last,
            run.config.keep_best,
        )
        clock = TrainingClock(run.device)
        progress = open_progress(run, clock, exit_stack)
        actions = periodic_actions(run, validation, bad_steps, saver, progress, clock, exit_stack)
        exit_stack.callback(windows.close)  # stops the DataLoader workers
        announce(run, progress)
        validation.measure()
        if not run.steps_done:
            progress.validated(0, validation.last)
        take_steps(run, windows, bad_steps, actions, clock, stop)
        saver.export()
        if run.skipped:
            steps = ", ".join(map(str, run.skipped))
            progress.print_line(f"{len(run.skipped)} bad steps skipped: {steps}")
        for line in validation.last.table:
            progress.print_line(line)
        return validation.last


def take_steps(
    run: Run,
    steps: Iterable[Tensor],
    bad_steps: BadSteps,
    actions: Sequence[Periodic],
    clock: TrainingClock,
    stop: Stop,
) -> None:
    """Take a training step for the windows [R, ...] of each of ``steps``, then the actions due.

    R is the number of windows of this process in a step. ``clock`` runs but for the actions that
    stop it. Raises Stopped after the step during which a signal came, or after the last of the
    steps that go together.
    """
    config, optim = run.config, run.config.optim
    stop.deferred = True
    clock.start()
    for step, windows in enumerate(steps, run.steps_done):
        batches = [run.source.to_batch(part) for part in windows.split(config.batch_size)]
        lr = learning_rate(step, config.steps, optim)
        start_time = time.perf_counter()
        loss, norm = train_step(
            run.model,
            run.optimizer,
            batches,
            lr=lr,
            grad_clip=optim.grad_clip,
            objective=run.objective,
            accept=partial(bad_steps.accept, step + 1),
            parallel=run.parallel,
        )
        may_stop = (step + 1) % config.steps_at_once == 0
        signum = run.parallel.all_reduce_max(stop.signum) if may_stop else 0
        is_last = step + 1 == config.steps
        done = StepResult(step + 1, batches, lr, loss, norm, start_time, signum, is_last)
        for action in actions:
            if action.is_due(done):
                with clock.stopped() if action.stops_clock else nullcontext():
                    action.run(done)
        if signum and not is_last:
            raise Stopped(signum, done.step)


def announce(run: Run, progress: Progress | NullProgress) -> None:
    """Print the data, the model, the run directory, and where a resumed run stands."""
    for line in run.source.describe():
        progress.print_line(line)
    progress.print_line(f"{run.summary}, run directory {Path(run.config.out)}")
    if run.config.keep_best and run.parallel.is_sharded:
        progress.print_line("best/ is not kept: no process holds the whole model")
    if 0 < run.steps_done < run.config.steps:
        progress.print_line(f"continuing after step {run.steps_done} of {run.config.steps}")
    if run.config.steps != run.steps_before:
        progress.print_line(describe_new_schedule(run))


def describe_new_schedule(run: Run) -> str:
    """Return a line on the learning rate of a resumed run whose number of steps was changed."""
    new, old, done = run.config.steps, run.steps_before, run.steps_done
    lr, lr_before = (learning_rate(done, steps, run.config.optim) for steps in (new, old))
    told = f"the schedule ends at step {new} now instead of {old}"
    if lr == lr_before:
        return told
    return f"{told}: the learning rate of step {done + 1} is {lr:.2e} instead of {lr_before:.2e}"


def periodic_actions(
    run: Run,
    validation: Validation,
    bad_steps: BadSteps,
    saver: Saver,
    progress: Progress | NullProgress,
    clock: TrainingClock,
    exit_stack: ExitStack,
) -> list[Periodic]:
    """Return the periodic actions of a run, in the order in which they run after a step."""
    config, out = run.config, Path(run.config.out)
    raise_if_bad = bad_steps.raise_if_bad
    is_main_process = run.parallel.is_main_process
    profiled = []
    if config.profile and is_main_process:
        profile = profiling(out, config.steps, clock, progress.print_line)
        profiled = [Periodic(1, exit_stack.enter_context(profile), stops_clock=False)]
    sampled = run.source.prompt, config.seed, run.parallel
    sample = partial(periodic.sample, run.model, *sampled)
    report = partial(periodic.report, progress, run.skipped, run.compiling_step)
    listed = [
        *profiled,
        Periodic(1, report, stops_clock=False),
        Periodic(
            config.log_every, partial(periodic.log, progress, saver, raise_if_bad, run.objective)
        ),
        Periodic(
            config.verify_every if is_main_process else 0,
            partial(periodic.verify, run.model, config.optim.z_loss, out, progress, raise_if_bad),
        ),
        Periodic(
            config.eval_every, partial(periodic.validate, validation, saver, progress, raise_if_bad)
        ),
        Periodic(config.sample_every, partial(sample, progress)),
        Periodic(
            -(-config.save_every // config.steps_at_once) * config.steps_at_once,
            partial(periodic.save, saver, run.skipped, progress, raise_if_bad),
            True,
        ),
    ]
    return [action for action in listed if action.every]
