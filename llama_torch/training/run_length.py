"""Change the number of steps of a run that exists, as ``--resume --steps N`` asks."""

from pathlib import Path

from llama_common.errors import InputError

from ..checkpoint import step_folders
from ..config import RunConfig
from .run_file import RunRecord, read_record, read_run, write_record


def steps_done(out: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 without one."""
    newest = step_folders.newest(out)
    return int(newest.name) if newest else 0


def recorded_steps(record: RunRecord) -> int:
    """Return the number of steps that a run was given, by its record."""
    default = record.config_class().steps
    return int(record.identity["steps"].value if "steps" in record.identity else default)


def require_same_length(record: RunRecord, steps: int, source: str) -> None:
    """Raise InputError for another number of steps that no flag gave but ``source``, a file.

    The learning rates depend on it: a run changes them where its user says so, and not for a
    default.
    """
    if steps != recorded_steps(record):
        raise InputError(
            f"{source}: steps is {steps} and the run's is {recorded_steps(record)}; remove it, or "
            f"give --steps {steps} to change the run's length"
        )


def require_steps_left(record: RunRecord, steps: int, done: int) -> None:
    """Raise InputError for a changed number of steps of which none is left to take."""
    if steps <= done and steps != recorded_steps(record):
        raise InputError(
            f"--steps {steps}: {record.path.parent} has {done} of {recorded_steps(record)} steps "
            f"done; give more than {done}, or leave --steps out"
        )


def describe_length(epochs: int, n_windows: int, steps: int, rows: int) -> str:
    """Return the epochs and steps of a run that reads ``rows`` of ``n_windows`` windows a step.

    ``epochs`` are those of --epochs, of which --steps may make more or less.
    """
    is_whole = steps == -(-epochs * n_windows // rows)
    times = f"{epochs:,}" if is_whole else f"{steps * rows / n_windows:,.2f}"
    return f"{times} epoch{'s' * (times != '1')} in {steps:,} step{'s' * (steps > 1)} of {rows:,}"


def record_length(config: RunConfig, done: int) -> int:
    """Write a changed number of steps to run.json; return the number that it held before.

    The caller holds the run's lock. Raises InputError where no step would be left.
    """
    out = Path(config.out)
    record = read_run(out)
    before = recorded_steps(record)
    require_steps_left(record, config.steps, done)
    if config.steps != before:
        table = read_record(record.path)
        table["identity"]["steps"] = table["settings"]["steps"] = config.steps
        # The curve of the learning rate cannot be drawn from the last length alone.
        table.setdefault("lengths", []).append({"until_step": done, "steps": before})
        try:
            write_record(record.path, table)
        except OSError as error:
            raise InputError(f"{record.path}: cannot be written ({error}); make room") from None
    return before
