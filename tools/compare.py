"""Compare a checkpoint's computation with the NumPy oracle's, and name the bug where they part.

``python tools/compare.py ckpt.safetensors``; exit code 0: within bounds, 1: not, 2: bad input.

The other side is run and recorded first; then the oracle goes through the same calls one layer
at a time, in float64 (which counts as exact) and in the dtype under test (which says how much
error honest rounding makes; the other side may be FACTOR times worse).
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich import progress as rich_progress
from rich.console import Console

# The tools are not installed: run as a script, their folder's parent is not on the path. Nor is
# the current folder, where --against package.module:object is likely to live.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), ""]

import reference_np.config
from llama_torch import cli
from llama_torch.checkpoint import write_text
from llama_torch.config import InputError
from parity_tests import backends
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING
from tools import report as reports
from tools import training_step
from tools.diagnosis import Diagnosis, diagnose
from tools.differences import Problem, compare, make_problem
from tools.inputs import make_calls, token_ids
from tools.replay import Replay, Weights
from tools.sides import Side, find_side, record
from tools.traces import Call, TraceWriter, write_trace


@dataclass(frozen=True)
class CompareConfig:
    """Compare a checkpoint's computation with the NumPy oracle's, and name the bug if any."""

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A .safetensors file or a model directory."""
    against: str = "torch"
    """What is tested: torch, cuda or hf, each with :float64, :float32, :bfloat16 or :float16; a
    trace file; another checkpoint; a backend by its name or as package.module:object."""
    dtype: Literal["", "float64", "float32", "bfloat16", "float16"] = ""
    """Precision under test; empty = float32, or the trace's. float64 leaves rounding nowhere to
    hide a bug."""
    prompt: str = ""
    """Text to run; empty = the start of Python's help topics."""
    file: str = ""
    """File with text to run."""
    ids: tuple[int, ...] = ()
    """Token ids to run."""
    tokens: tuple[int, ...] = ()
    """Lengths of the prompts, each a run of its own; empty = 48, or all of what is given."""
    steps: int = 2
    """Tokens decoded one by one with the cache, after each prompt."""
    layers: str = ""
    """A range like 3:5 (layers 3 and 4): compare these alone, on the other side's input to them."""
    grads: bool = False
    """Compare a training step as well: loss, every gradient, and what AdamW makes of them."""
    all: bool = False
    """Show what holds, too."""
    json: str = ""
    """File for the report as JSON; - = standard output, instead of the table."""
    html: str = ""
    """File for the report as a page (needs matplotlib)."""
    trace: str = ""
    """File for the oracle's own trace of the same calls, in the dtype under test."""
    diagnose: bool = True
    """Look for the known bugs that explain a divergence."""

    def __post_init__(self) -> None:
        if self.tokens and min(self.tokens) < 1:
            raise InputError(f"--tokens must be positive, got {min(self.tokens)}")
        if self.steps < 0:
            raise InputError(f"--steps must not be negative, got {self.steps}")


def layer_range(text: str, n_layers: int) -> tuple[int, int]:
    """Return the first layer and the one after the last."""
    if not text:
        return 0, n_layers
    first, colon, last = text.partition(":")
    try:
        start = int(first or 0)
        stop = (int(last) if last else n_layers) if colon else start + 1
    except ValueError:
        raise InputError(f"--layers {text}: give a range like 3:5, or one layer") from None
    if not 0 <= start < stop <= n_layers:
        raise InputError(f"--layers {text}: the model has layers 0 to {n_layers - 1}")
    return start, stop


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Show bars with their ETA on a terminal; yields (what, steps) -> function for a step done."""
    console = Console(stderr=True)
    bars = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("ETA"),
        rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )

    def start(what: str, steps: int) -> Callable[[], None]:
        task = bars.add_task(what, total=steps)
        return lambda: bars.advance(task)

    with bars:
        yield start


Start = Callable[[str, int], Callable[[], None]]


def check_trains(side: Side) -> None:
    """Raise InputError where --grads cannot be compared at all."""
    if side.backend is None:
        raise InputError(f"--grads: {side.title} cannot be trained; give a backend or a checkpoint")
    if side.dtype not in ("float64", "float32"):
        raise InputError("--grads compares in float32 or float64; leave the precision out")
    if not callable(getattr(backends.load(side.backend), "loss_and_grads", None)):
        raise InputError(f"--grads: {side.title} offers no loss_and_grads; leave the flag out")


def compare_training(
    side: Side, checkpoint: Checkpoint, ids: np.ndarray, start: Start, diagnosing: bool
) -> tuple[list[Any], Diagnosis, list[str]]:
    """Take a training step on both sides; return its rows, their diagnosis, and notes."""
    backend = backends.load(side.backend, "--against")
    exact_params = dict(checkpoint)
    params = dict(Checkpoint(checkpoint.path, side.dtype))
    theirs_params = params
    if side.weights is not None:
        theirs_params = dict(Checkpoint(side.weights, side.dtype))
    trains = callable(getattr(backend, "train", None))
    notes = [] if trains else [f"{side.title} offers no training step: gradients alone"]
    task = training_step.Task(
        checkpoint.config, training_step.make_batches(ids), {}, training_step.STEP.z_loss
    )
    advance = start("training step", 3)
    while True:
        exact = training_step.oracle_values(task, exact_params, False)
        grads = {name: value for name, value in exact.items() if name != "loss"}
        task = task._replace(clips=training_step.clips(grads))
        try:
            theirs = training_step.their_values(backend, task, theirs_params, trains)
            break
        except NotImplementedError as error:
            if not task.z_loss:
                raise InputError(f"--grads: {side.title} does not offer it ({error})") from None
            notes.append(f"z-loss is left out: {error} is not offered")
            task = task._replace(z_loss=0.0)
    advance()
    exact = training_step.oracle_values(task, exact_params, trains)
    advance()
    plain = exact
    if side.dtype != "float64":
        plain = training_step.oracle_values(task, params, trains)
    advance()
    rows = training_step.compare_step(task, side.dtype, theirs, exact, plain, trains)
    found = Diagnosis([], [], 0)
    if diagnosing and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", len(TRAINING))
        found = training_step.diagnose_step(task, params, theirs, rows, trains, advance)
    return rows, found, notes


def write_oracle_trace(path: str, problem_weights: Weights, calls: Sequence[Call]) -> None:
    """Write the oracle's own activations of the calls."""
    config = problem_weights.checkpoint.config

    def fill(writer: TraceWriter) -> None:
        oracle = Replay(config, calls, problem_weights)
        for stage in range(-1, config.n_layers + 1):
            for (c, name), value in oracle.run(stage).items():
                writer.add(c, name, value)

    write_trace(Path(path), config, calls, problem_weights.precision, fill)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))
    except reference_np.config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(CompareConfig, argv)
    checkpoint = Checkpoint(settings.ckpt, np.float64)
    side = find_side(settings.against, settings.dtype, checkpoint)
    first, last = layer_range(settings.layers, checkpoint.config.n_layers)
    if settings.grads:
        check_trains(side)
    ids, calls = _input(settings, side, checkpoint.config)
    with (
        progress() as start,
        tempfile.TemporaryDirectory() as folder,
        np.errstate(all="ignore"),  # what is not finite is reported by its name
    ):
        report = _report(settings, checkpoint, side, calls, ids, (first, last), start, Path(folder))
    if settings.html:
        from tools.page import page

        write_text(Path(settings.html), page(report))
    if settings.json:
        text = json.dumps(report, allow_nan=False)
        if settings.json == "-":
            print(text)
        else:
            write_text(Path(settings.json), text + "\n")
    if settings.json != "-":
        console = Console(highlight=False)
        console.width = max(console.width, 100) if not console.is_terminal else console.width
        reports.show(report, console, settings.all)
    return 0 if report["verdict"]["holds"] else 1


def _input(
    settings: CompareConfig, side: Side, config: LlamaConfig
) -> tuple[np.ndarray, Sequence[Call]]:
    """Return the token ids and the calls to run; a trace brings its own."""
    if side.trace is not None:
        for flag in ("prompt", "file", "ids", "tokens"):
            if getattr(settings, flag):
                raise InputError(f"--{flag}: a trace is compared on its own tokens; leave it out")
        return np.zeros(0, np.int64), side.trace.calls
    ids = token_ids(
        config,
        prompt=settings.prompt,
        file=settings.file,
        ids=settings.ids,
        limit=max(settings.tokens, default=config.max_seq_len),
    )
    given = settings.prompt or settings.file or settings.ids
    lengths = settings.tokens or ((len(ids),) if given else (48,))
    return ids, make_calls(ids, config, lengths, settings.steps)


def _report(
    settings: CompareConfig,
    checkpoint: Checkpoint,
    side: Side,
    calls: Sequence[Call],
    ids: np.ndarray,
    layers: tuple[int, int],
    start: Start,
    folder: Path,
) -> dict[str, Any]:
    """Run everything; return the report."""
    config = dataclasses.replace(checkpoint.config, n_layers=layers[1])
    recording = record(side, calls, config, folder, start(side.title, len(calls) * config.n_layers))
    problem = make_problem(checkpoint, config, calls, side.dtype, recording, layers[0])
    if settings.trace:
        exact = problem.low if problem.dtype in ("float64", "float32") else problem.exact
        write_oracle_trace(settings.trace, exact, calls)
    findings = reports.Findings(calls)
    for stage in compare(problem, start("oracle", len(problem.stages()))):
        findings.add(stage)
    diagnosis = _diagnose(settings, problem, findings, start)
    n_tokens = sum(call.tokens.size for call in calls)
    expected, what = len(problem.expected()), "activations"
    rows, training = findings.rows, None
    if settings.grads:
        step_rows, step_diagnosis, notes = compare_training(
            side, checkpoint, ids[: max(settings.tokens, default=48)], start, settings.diagnose
        )
        training = {
            "rows": [reports.row_entry(row) for row in step_rows],
            "notes": notes,
            **reports.diagnosis_entries(step_diagnosis, step_rows, calls),
        }
        rows = rows + step_rows
        expected += len(
            training_step.names(checkpoint.config, not notes or "train" not in notes[0])
        )
        what = "quantities"
    unknown = side.trace.unknown if side.trace is not None else []
    return {
        "schema": reports.SCHEMA,
        "title": (
            f"{settings.ckpt}: oracle against {side.title}, {side.dtype}, {n_tokens} tokens in "
            f"{len(calls)} calls"
            + (f", layers {layers[0]} to {layers[1] - 1}" if settings.layers else "")
        ),
        "checkpoint": settings.ckpt,
        "against": settings.against,
        "dtype": side.dtype,
        "n_layers": checkpoint.config.n_layers,
        "layers": list(layers),
        "calls": [
            {"name": call.name, "after": call.after, "tokens": call.tokens.tolist()}
            for call in calls
        ],
        "coverage": recording.coverage,
        "verdict": reports.verdict(rows, expected, calls, what),
        "rows": [reports.row_entry(row) for row in findings.rows],
        "first_divergence": findings.first,
        **reports.diagnosis_entries(diagnosis, findings.rows, calls),
        "logits": findings.logits,
        "heatmap": findings.heatmap,
        "training": training,
        "warnings": f"Not in the format and ignored: {', '.join(unknown)}" if unknown else "",
    }


def _diagnose(settings: CompareConfig, problem: Problem, findings: Any, start: Start) -> Diagnosis:
    if not settings.diagnose or all(row.status != "diverges" for row in findings.rows):
        return Diagnosis([], [], 0)
    return diagnose(problem, findings.rows, start("known bugs", len(FORWARD) + 1))


if __name__ == "__main__":
    sys.exit(main())
