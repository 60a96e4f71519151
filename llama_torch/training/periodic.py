"""Periodic actions after a training step: log, verify, validate, sample, save."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from llama_common.errors import VerificationError

from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .batch import Batch
from .objective import Objective
from .progress import NullProgress, Progress
from .prompt import Prompt
from .saver import Saver
from .validate import Validation, sample_text

Reporter = Progress | NullProgress


class StepResult(NamedTuple):
    """The result of one training step, taken or skipped."""

    step: int  # from 1
    batches: Sequence[Batch]
    lr: float
    loss: Tensor  # float64 scalar, of all processes
    norm: Tensor  # scalar, of the gradients before clipping
    start_time: float  # by time.perf_counter
    signum: int  # of a signal that any process received by its end; 0 = none
    is_last: bool


class Periodic(NamedTuple):
    """An action that is due after every ``every``-th step and after the last; 0 = never."""

    every: int
    run: Callable[[StepResult], None]
    at_signal: bool = False  # due as well where a signal ends the run
    stops_clock: bool = True  # its time is none of training's; stopping waits for a GPU

    def is_due(self, done: StepResult) -> bool:
        """Return whether the action is due after this step."""
        stopped = self.at_signal and done.signum > 0
        return done.is_last or stopped or done.step % self.every == 0


def report(
    progress: Reporter, skipped: Sequence[int], compiling_step: int, done: StepResult
) -> None:
    """Advance the progress bar; report the step that compiled the model, and a skipped one."""
    progress.advance(done.step, sum(batch.tokens.numel() for batch in done.batches))
    if done.step == compiling_step:
        done.loss.item()  # waits for the device
        progress.compiled(done.step, time.perf_counter() - done.start_time)
    if skipped and skipped[-1] == done.step:
        progress.skipped(done.step, done.loss.item(), done.norm.item(), len(skipped))


def log(
    progress: Reporter,
    saver: Saver,
    raise_if_bad: Callable[[], None],
    objective: Objective,
    done: StepResult,
) -> None:
    """Report the checkpoints completed since the last call, and the step's metrics."""
    for saved in saver.completed():
        progress.saved(saved)
    raise_if_bad()
    measures = dict(zip(objective.names, objective.latest.tolist(), strict=True))
    progress.trained(done.step, done.loss.item(), done.lr, done.norm.item(), measures)


def verify(
    model: Llama,
    z_loss: float,
    out: Path,
    progress: Reporter,
    raise_if_bad: Callable[[], None],
    done: StepResult,
) -> None:
    """Compare the model with the oracle; raise VerificationError where it differs."""
    from .verify import check, complaint, worst_errors  # imports the oracle

    raise_if_bad()
    checked = check(model, done.batches, z_loss)
    progress.verified(done.step, worst_errors(checked))
    if not all(one.holds for one in checked):
        raise VerificationError(complaint(checked, out, done.step))


def validate(
    validation: Validation,
    saver: Saver,
    progress: Reporter,
    raise_if_bad: Callable[[], None],
    done: StepResult,
) -> None:
    """Measure the validation loss, and save the model to best/ if it is the lowest so far."""
    raise_if_bad()
    validation.measure()
    progress.validated(done.step, validation.last)
    saver.validated(done.step, validation.loss)


def sample(
    model: Llama,
    make_prompt: Callable[[], Prompt],
    seed: int,
    parallel: Parallel,
    progress: Reporter,
    done: StepResult,
) -> None:
    """Generate and report a sample of text."""
    text = sample_text(model, make_prompt, seed, done.step, parallel)
    progress.sampled(done.step, text)


def save(
    saver: Saver,
    skipped: Sequence[int],
    progress: Reporter,
    raise_if_bad: Callable[[], None],
    done: StepResult,
) -> None:
    """Save a checkpoint; at the end of the run, wait until it is written."""
    raise_if_bad()
    for saved in saver.save(done.step, skipped, wait=done.is_last or done.signum > 0):
        progress.saved(saved)
