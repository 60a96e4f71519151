"""Judge one training step of the other side from its own state before the step.

So an error is of that step alone, whatever the steps before did. Whole models are held in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reference_np.ops import Array
from reference_np.optim import OptState
from reference_np.training_mutants import TRAINING

from .diagnosis import Diagnosis
from .judging import Row
from .progress import Start
from .training_step import compare_step, diagnose_step, gradients, step_values
from .training_task import Task

RUN = "step"  # the only run of such a step, by the names of training_task.quantity_names
Params = Mapping[str, Array]


class StepStart(NamedTuple):
    """Where a step starts: the parameters in float64 and in the precision under test."""

    exact: Params
    low: Params
    state: OptState | None
    updates: bool = True  # whether the optimizer's state is known
    # The oracle's loss and gradients there, of both parameters, where they are known already.
    gradients: tuple[Any, Any] | None = None


def judge_step(
    task: Task,
    dtype: str,
    at: StepStart,
    theirs: Mapping[str, Array],
    s: int,
    start: Start | None,
    expected: Sequence[str] | None = None,
) -> tuple[list[Row], Diagnosis | None]:
    """Return the rows of step ``s`` and, with ``start``, the diagnosis of those that diverge.

    ``theirs``: its results by the names of ``step_values``; ``expected``: the names to judge, by
    default those of ``theirs``.
    """
    known = at.gradients or (gradients(task, at.exact), None)
    exact = step_values(task, at.exact, known[0], trains=True)
    baseline = exact
    if dtype != "float64":
        low = gradients(task, at.low) if known[1] is None else known[1]
        baseline = step_values(task, at.low, low, trains=True)
    names = [name for name in exact if name in theirs] if expected is None else expected
    rows = compare_step(task, dtype, theirs, exact, baseline, names)
    diagnosis = None
    if start is not None and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", len(TRAINING))
        diagnosis = diagnose_step(task, dtype, at.exact, at.low, theirs, exact, rows, advance)
        diagnosis = Diagnosis(
            [e._replace(row=_renamed(e.row, s)) for e in diagnosis.explanations],
            [_renamed(row, s) for row in diagnosis.unexplained],
        )
    return [_renamed(row, s) for row in rows], diagnosis


def _renamed(row: Row, s: int) -> Row:
    """Return a row under the name that its tensor has in the trace, but for the update."""
    name = row.name.removeprefix(f"{RUN} ")
    if name.startswith("step "):
        name = f"update {name.removeprefix('step ')}"
    return row._replace(name=f"step {s} {name}")
