"""The training loop: data, a step, what is done every so many steps, and signals to stop."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from ..common.torchrun import is_launched
from ..config import TrainConfig
from ..data.corpus import describe
from . import periodic
from .bad_steps import BadSteps
from .optimizer import learning_rate
from .periodic import Periodic, StepResult
from .progress import NullProgress, Progress, open_progress
from .saver import Saver, make_saver
from .setup import Run, setup
from .signals import Stop, Stopped, signals
from .step import train_step
from .trace import tracing
from .validate import Validation


def train(config: TrainConfig) -> float:
    """Train as ``config`` says, resuming where it says so; return the last validation loss.

    Raises Stopped when SIGINT or SIGTERM ends the run before its last step.
    """
    with ExitStack() as held:
        stop = held.enter_context(signals(hears_twice=is_launched()))
        run = setup(config, held)
        windows, validation, bad_steps = run.train_windows(), run.validation(), run.bad_steps()
        saver = make_saver(
            Path(run.config.out),
            run.model,
            run.optimizer,
            run.parallel,
            run.config.keep_last,
            run.config.keep_best,
        )
        progress = open_progress(run, held)
        actions = periodic_actions(run, validation, bad_steps, saver, progress, held)
        held.callback(windows.close)  # and with it the processes that prepare them
        announce(run, progress)
        validation.measure()
        if not run.first_step:
            progress.validated(0, validation.loss)
        take_steps(run, windows, bad_steps, actions, stop)
        saver.export()
        if run.skipped:
            steps = ", ".join(map(str, run.skipped))
            progress.say(f"{len(run.skipped)} bad steps skipped: {steps}")
        return validation.loss


def take_steps(
    run: Run,
    windows: Iterable[Tensor],
    bad_steps: BadSteps,
    actions: Sequence[Periodic],
    stop: Stop,
) -> None:
    """Take a step for each of ``windows``, int64 [rows, T + 1], and the actions due after it.

    A signal that comes during a step ends the run after it; Stopped is raised.
    """
    config, optim = run.config, run.config.optim
    stop.deferred = True
    for step, window in enumerate(windows, run.first_step):
        batches = [run.to_batch(rows) for rows in window.split(config.batch_size)]
        lr, began = learning_rate(step, config.steps, optim), time.perf_counter()
        loss, norm = train_step(
            run.model,
            run.optimizer,
            batches,
            lr=lr,
            grad_clip=optim.grad_clip,
            z_loss=optim.z_loss,
            accept=partial(bad_steps.accept, step + 1),
            parallel=run.parallel,
        )
        signum, is_last = run.parallel.all_reduce_max(stop.asked), step + 1 == config.steps
        done = StepResult(step + 1, batches, lr, loss, norm, began, signum, is_last)
        for action in actions:
            if action.is_due(done):
                action.run(done)
        if signum and not is_last:
            raise Stopped(signum, done.step)


def announce(run: Run, progress: Progress | NullProgress) -> None:
    """Print the text, the model and the run directory, and the step to continue after."""
    progress.say(describe(run.corpus))
    progress.say(f"{run.summary}, run directory {Path(run.config.out)}")
    if run.config.keep_best and run.parallel.is_sharded:
        progress.say("best/ is not kept: no process holds the whole model")
    if run.first_step:
        progress.say(f"continuing after step {run.first_step}")


def periodic_actions(
    run: Run,
    validation: Validation,
    bad_steps: BadSteps,
    saver: Saver,
    progress: Progress | NullProgress,
    held: ExitStack,
) -> list[Periodic]:
    """List what is done after every so many steps, in the order in which it is done."""
    config, out, look = run.config, Path(run.config.out), bad_steps.look
    is_first, z_loss = run.parallel.is_main_process, config.optim.z_loss
    trace = partial(tracing, out, config.steps, progress.say)
    profiled = [Periodic(1, held.enter_context(trace()))] if config.profile and is_first else []
    sample = partial(periodic.sample, run.model, config.sample_prompt, config.seed, run.parallel)
    listed = [
        *profiled,
        Periodic(1, partial(periodic.report, progress, run.skipped, run.compiling_step)),
        Periodic(config.log_every, partial(periodic.log, progress, saver, look)),
        Periodic(
            config.verify_every if is_first else 0,
            partial(periodic.verify, run.model, z_loss, out, progress, look),
        ),
        Periodic(config.eval_every, partial(periodic.validate, validation, saver, progress, look)),
        Periodic(config.sample_every, partial(sample, progress)),
        Periodic(
            config.save_every, partial(periodic.save, saver, run.skipped, progress, look), True
        ),
    ]
    return [action for action in listed if action.every]
