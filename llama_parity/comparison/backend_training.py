"""Compare the training steps that a backend takes.

Two micro-batches with unequal numbers of targets share every step. The first one is taken once
with a limit that clips and once with one that does not, both at the peak of the schedule; then,
if that is right, some steps after one another through warmup and decay. Each of those is judged
from the backend's own state before it. Whole models are held in memory.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reference_np import backend as backends
from reference_np.config import InputError
from reference_np.grad import Batch
from reference_np.naming import parameter_shapes
from reference_np.ops import Array
from reference_np.optim import Hyperparameters, OptState
from reference_np.training_mutants import TRAINING

from .backend_side import BackendParams
from .diagnosis import Diagnosis
from .engine_side import call_backend
from .judging import Row
from .progress import Start
from .replayed_step import RUN, StepStart, judge_step
from .sides import Side
from .source import Source, open_checkpoint
from .training_step import (
    as_tokens,
    compare_step,
    diagnose_step,
    exact_and_low_params,
    gradient_values,
    gradients,
    step_values,
    update_values,
)
from .training_task import (
    HYPERPARAMETERS,
    KINDS,
    N_STEPS,
    RUNS,
    SCHEDULE,
    Task,
    clip_limits,
    quantity_names,
)
from .within_limits import config_within

NO_STEP = "clipping and AdamW"
FIRST_ALONE = "beta2 and the schedule (first step alone)"


class Findings(NamedTuple):
    """The rows of a backend's steps, their diagnosis, notes to print, and what is not seen."""

    rows: list[Row]
    diagnosis: Diagnosis
    notes: list[str]
    unseen: list[str]


class Trainer:
    """Calls a backend's ``loss_and_grads`` and ``train``, each time from the checkpoint."""

    def __init__(self, side: Side, checkpoint: Source, batches: Sequence[Batch]) -> None:
        self.backend, self.batches = backends.load(side.backend, "--against"), batches
        self.config = config_within(side.limits, checkpoint.config)
        path = checkpoint.path if side.weights is None else side.weights
        self.params = BackendParams(open_checkpoint(path, side.dtype), self.config, side.dtype)

    def loss_and_grads(self, z_loss: float) -> Any:
        """Return the backend's loss and gradients by name."""
        return self._call("loss_and_grads", z_loss)

    def train(self, hyper: Hyperparameters, steps: int) -> Any:
        """Return what the backend's ``train`` does."""
        return self._call("train", hyper, steps)

    def _call(self, name: str, *arguments: Any) -> Any:
        given = (self.config, self.params, copy.deepcopy(self.batches), *arguments)
        return call_backend(self.backend, name, "the training step", *given)


class TheirStep(NamedTuple):
    """The other side's first training step, and the part of it that is compared."""

    task: Task  # without z-loss where that is not offered
    exact_gradients: Any  # the oracle's loss and gradients, which decide where norms are clipped
    values: dict[str, Array]
    trains: bool  # whether there is more than gradients
    notes: list[str]


def compare_training(
    side: Side, checkpoint: Source, batches: list[Batch], start: Start, diagnosing: bool
) -> Findings:
    """Take the training steps on both sides; return what is found.

    Raises InputError for a backend without gradients, and for one that fails.
    """
    exact_params, low_params = exact_and_low_params(checkpoint, side.dtype)
    advance = start("training step", 3)
    trainer = Trainer(side, checkpoint, batches)
    step = _their_step(trainer, side.title, exact_params)
    task, trains = step.task, step.trains
    advance()
    exact_values = step_values(task, exact_params, step.exact_gradients, trains)
    advance()
    baseline, low_gradients = exact_values, None
    if low_params is not exact_params:
        low_gradients = gradients(task, low_params)
        baseline = step_values(task, low_params, low_gradients, trains)
    advance()
    names = quantity_names([*parameter_shapes(task.config)], trains)
    rows = compare_step(task, side.dtype, step.values, exact_values, baseline, names)
    if trains and all(row.held for row in rows):
        if zero := _zero_gradient(step.exact_gradients[1]):
            notes = [*step.notes, f"No further step is judged: the gradient of {zero} is zero."]
            return Findings(rows, Diagnosis([], []), notes, [FIRST_ALONE])
        both = (step.exact_gradients, low_gradients)
        at = StepStart(exact_params, low_params, None, gradients=both)
        more = _further_steps(trainer, task, side.dtype, at, start, diagnosing)
        return more._replace(rows=rows + more.rows, notes=step.notes + more.notes)
    notes = [*step.notes]
    notes += ["No further step is judged: the first one is wrong already."] if trains else []
    diagnosis = Diagnosis([], [])
    if diagnosing and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", len(TRAINING))
        diagnosis = diagnose_step(
            task, side.dtype, exact_params, low_params, step.values, exact_values, rows, advance
        )
    return Findings(rows, diagnosis, notes, [FIRST_ALONE if trains else NO_STEP])


def _zero_gradient(gradients: Mapping[str, Array]) -> str:
    """Return the name of a parameter whose whole gradient is zero; "" where there is none.

    A step later it is made of rounding, as where the embedding is zero; AdamW divides by its size.
    """
    return next((name for name, value in gradients.items() if not np.any(value)), "")


def _their_step(trainer: Trainer, title: str, exact_params: Mapping[str, Array]) -> TheirStep:
    """Take the other side's first step, as much of it as its backend offers.

    Raises InputError for a backend without gradients, and for one that fails.
    """
    notes: list[str] = []
    task = Task(trainer.config, trainer.batches, {}, HYPERPARAMETERS.z_loss)
    try:
        loss_and_grads = trainer.loss_and_grads(task.z_loss)
    except NotImplementedError as error:
        notes.append(f"z-loss is left out ({error})")
        task = task._replace(z_loss=0.0)
        try:
            loss_and_grads = trainer.loss_and_grads(0.0)
        except NotImplementedError as other:
            raise InputError(f"--grads: {title} does not offer it ({other})") from None
    exact_gradients = gradients(task, exact_params)
    task = task._replace(clip_limits=clip_limits(exact_gradients[1]))
    try:
        steps = {}
        for run in RUNS:
            hyper = replace(HYPERPARAMETERS, z_loss=task.z_loss, grad_clip=task.clip_limits[run])
            steps[run] = trainer.train(hyper, 1)
    except NotImplementedError as error:
        notes.append(f"gradients alone, no step ({error})")
        steps = {}
    try:
        values = gradient_values(*loss_and_grads)
        for run, step in steps.items():
            values |= _update_values(run, step, 0, trainer.params)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _other_form(error) from None
    return TheirStep(task, exact_gradients, values, bool(steps), notes)


def _further_steps(
    trainer: Trainer, task: Task, dtype: str, at: StepStart, start: Start, diagnosing: bool
) -> Findings:
    """Take some steps through the schedule; return what is found, up to the first wrong step.

    ``train`` begins with the checkpoint each time, so that one call for each number of steps shows
    the state after every step.
    """
    advance = start("further training steps", N_STEPS)
    task = task._replace(clip_limits={RUN: task.clip_limits["whole"]}, hyper=SCHEDULE)
    hyper = replace(SCHEDULE, z_loss=task.z_loss, grad_clip=task.clip_limits[RUN])
    names = _names_of_further_steps(trainer.params)
    before: Mapping[str, Any] = trainer.params
    rows: list[Row] = []
    for s in range(N_STEPS):
        try:
            found = trainer.train(hyper, s + 1)
        except NotImplementedError as error:
            notes = [f"the first {s} steps of the schedule alone ({error})"]
            return Findings(rows, Diagnosis([], []), notes, [FIRST_ALONE])
        try:
            values = _update_values(RUN, found, s, before)
            values["loss"] = as_tokens(found["loss"][s])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _other_form(error) from None
        given = task._replace(state=at.state)
        tried = start if diagnosing else None
        judged, diagnosis = judge_step(given, dtype, at, values, s, tried, names)
        rows += judged
        advance()
        if not all(row.held for row in judged):
            left = N_STEPS - s - 1
            notes = [f"{left} further steps are not judged: step {s} is wrong."] if left else []
            return Findings(rows, diagnosis or Diagnosis([], []), notes, [])
        at, before = _after(found, s + 1, dtype)
    return Findings(rows, Diagnosis([], []), [], [])


def _names_of_further_steps(parameters: Mapping[str, Array]) -> list[str]:
    """Return the names of a further step's results, all of which a backend is to show."""
    moved = [f"{RUN} {kind} {name}" for kind in KINDS for name in parameters]
    return ["loss", f"{RUN} grad_norm", *moved]


def _after(found: Any, steps: int, dtype: str) -> tuple[StepStart, Mapping[str, Array]]:
    """Return where the next step starts, and the parameters there as the backend gave them."""
    params, exp_avg, exp_avg_sq = (
        {name: np.asarray(value, np.float64) for name, value in found[kind].items()}
        for kind in ("params", "exp_avg", "exp_avg_sq")
    )
    low = {name: value.astype(dtype) for name, value in params.items()}
    exact = {name: value.astype(np.float64) for name, value in low.items()}
    return StepStart(exact, low, OptState(steps, exp_avg, exp_avg_sq)), params


def _update_values(run: str, found: Any, s: int, before: Mapping[str, Array]) -> dict[str, Array]:
    """Return the results of step ``s`` by the names of ``quantity_names``.

    ``before``: the parameters before it. Raises KeyError, IndexError, TypeError or ValueError for
    results of another form; a moment that is left out is missing from the result.
    """
    state = OptState(s + 1, found.get("exp_avg", {}), found.get("exp_avg_sq", {}))
    return update_values(run, found["grad_norm"][s], state, before, found["params"])


def _other_form(error: Exception) -> InputError:
    """Return the error that says that a backend's results are of another form."""
    return InputError(
        f"--against: loss_and_grads or train returned something else than the protocol says "
        f"({type(error).__name__}: {error}); see reference_np/backend.py"
    )
