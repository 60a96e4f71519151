"""Run one comparison, from its settings to its report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import InputError, printable
from reference_np import backend as backends
from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from . import backend_training
from . import report as reports
from .backend_side import TRAINING_METHODS
from .comparison import Comparison, make_comparison
from .config import CompareConfig
from .diagnosis import Diagnosis, diagnose
from .differences import compare
from .engine_report import engine_entries
from .float32_angles import BACKENDS_DECLARATION, TRACES_DECLARATION, Float32Angles
from .judging import Row
from .oracle_trace import write_oracle_trace
from .padding import find_padding, padding_note
from .progress import Start
from .report_rows import counted
from .sides import Recording, Side, is_covered, record
from .source import Source
from .trace_file import TraceFile
from .trace_format import LONGEST_NAME, Call
from .trace_training import TracedSteps, compare_traced_steps
from .verdict import Extent, extent_noun, unjudged_calls, unseen_outputs, verdict


class TrainingInput(NamedTuple):
    """What a training step is taken on: micro-batches, and what is known of their labels."""

    batches: list[Batch]
    rows: Sequence[Row] = ()  # of labels
    notes: Sequence[str] = ()


def layer_range(text: str, n_layers: int) -> tuple[int, int]:
    """Return the first layer that ``--layers`` names, and the one after the last.

    Raises InputError for no range, and for layers that the model does not have.
    """
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


def check_trains(side: Side, flag: str = "--grads") -> None:
    """Raise InputError where the other side's gradients, for ``flag``, cannot be compared."""
    if side.trace is not None and flag != "--grads":
        raise InputError(f"{flag}: a trace has its own tokens; give a backend or a checkpoint")
    if side.trace is not None:
        if not side.trace.steps:
            raise InputError(f"--grads: {side.title} has no training step; leave the flag out")
        return
    if side.backend is None:
        raise InputError(f"{flag}: {side.title} cannot be trained; give a backend or a checkpoint")
    if side.dtype not in ("float64", "float32"):
        raise InputError(f"{flag} compares in float32 or float64; leave the precision out")
    backend = backends.load(side.backend, "--against")
    if not callable(getattr(backend, "loss_and_grads", None)):
        raise InputError(f"{flag}: {side.title} offers no loss_and_grads; leave the flag out")


def _left_out(
    settings: CompareConfig, side: Side, calls: Sequence[Call], config: LlamaConfig
) -> str:
    """Return warnings of tensors of a trace and of lengths asked for that are not compared."""
    warnings = []
    if side.trace is not None:
        unknown = side.trace.unknown
        shown = [printable(name, LONGEST_NAME) for name in unknown[:8]]
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        if unknown:
            warnings.append(f"Not in the format and ignored: {', '.join(shown)}{more}.")
    elif not settings.sft:
        decoded = any(call.after is not None and call.positions is None for call in calls)
        if settings.steps and not decoded:
            warnings.append(f"No decoding: a context of {config.max_seq_len} has no room for it.")
        if settings.tokens and calls[0].tokens.shape[1] < settings.tokens[0]:
            warnings.append(f"The prompts are cut to what a context of {config.max_seq_len} holds.")
    return " ".join(warnings)


def run_comparison(
    settings: CompareConfig,
    checkpoint: Source,
    config: LlamaConfig,
    side: Side,
    calls: Sequence[Call],
    training: TrainingInput | None,
    layers: tuple[int, int],
    start: Start,
    folder: Path,
) -> dict[str, Any]:
    """Run both sides on the calls and the training step; return the report's dictionary.

    ``config`` is the checkpoint's, inside the limits of the other side; ``folder`` takes its
    activations; ``layers`` is the range that is compared.
    """
    engines = _engines(settings.beside, side)
    config = dataclasses.replace(config, n_layers=layers[1])
    recording = record(side, calls, config, folder, start(side.title, len(calls) * config.n_layers))
    comparison = make_comparison(checkpoint.path, config, calls, side.dtype, recording, layers[0])
    if settings.trace:
        batches = None if training is None else training.batches
        write_oracle_trace(
            Path(settings.trace).resolve(), comparison, checkpoint, side.trace, batches
        )
    angles = Float32Angles(comparison, side.dtype in side.limits.float32_angles)
    builder, diagnosis = _compare_activations(comparison, angles, start, settings.diagnose)
    traced = None
    if training is not None or (side.trace and side.trace.steps):
        traced = _compare_training(side, checkpoint, training, start, settings.diagnose)
    rows, extent = builder.rows, _extent(recording, calls, side, traced)
    expected = len(comparison.expected())
    if traced is not None:
        rows, expected = rows + traced.rows, expected + len(traced.rows)
    return {
        **_header(settings, checkpoint, side, calls, layers),
        "coverage": recording.coverage,
        "verdict": verdict(rows, expected, calls, extent),
        "rows": [reports.row_entry(row) for row in builder.rows],
        "first_divergence": builder.first_divergence,
        **reports.diagnosis_entries(diagnosis, builder.rows, calls),
        "logits": builder.logits,
        "logprobs": builder.logprobs,
        "engines": engines,
        "heatmap": builder.heatmap,
        "training": None if traced is None else _training_entry(traced, calls),
        "warnings": _warnings(settings, side, comparison, builder, angles),
    }


def _extent(
    recording: Recording, calls: Sequence[Call], side: Side, traced: TracedSteps | None
) -> Extent:
    """Return how much of the other side was compared."""
    trace = side.trace
    unseen = [] if trace is None else unseen_outputs(recording)
    unjudged = [] if trace is None else unjudged_calls(recording, calls)
    noun, steps = "outputs" if unseen else "activations", (0, 0)
    if traced is not None:
        noun, steps = "quantities", (traced.judged, len(trace.steps) if trace else traced.judged)
        unseen, unjudged = unseen + traced.unseen, unjudged + traced.unjudged
    trained = TRAINING_METHODS if traced is not None else ()
    uncalled = [name for name in side.uncalled if name not in trained]
    return Extent(extent_noun(noun, recording, calls, steps), unseen, unjudged, uncalled)


def _warnings(
    settings: CompareConfig,
    side: Side,
    comparison: Comparison,
    builder: reports.ReportBuilder,
    angles: Float32Angles,
) -> str:
    """Return sentences of padding, angles, reordered activations, slips, and what is left out."""
    calls, covered = comparison.calls, [*map(is_covered, comparison.recording.coverage)]
    notes = (
        angles.note(_angles_declaration(settings, side)),
        padding_note(calls, find_padding(calls), covered),
        reports.reordered_warning(builder.rows, calls),
        *builder.slips,
        _left_out(settings, side, calls, comparison.config),
    )
    return " ".join(filter(None, notes))


def _angles_declaration(settings: CompareConfig, side: Side) -> str:
    """Return how the other side declares float32 angles; "" where it cannot."""
    if side.trace is not None:
        return TRACES_DECLARATION
    is_backend = ":" in settings.against and side.backend is not None
    return BACKENDS_DECLARATION if is_backend else ""


def _engines(beside: str, side: Side) -> dict[str, Any] | None:
    """Return the report's part about a second trace, None without one.

    Raises InputError for one that does not fit the first, and without a first.
    """
    if not beside:
        return None
    if side.trace is None:
        raise InputError(f"--beside {beside}: needs a trace in --against too; give both engines'")
    return {"beside": beside, **engine_entries(side.trace, TraceFile(beside))._asdict()}


def _compare_activations(
    comparison: Comparison, angles: Float32Angles, start: Start, diagnosing: bool
) -> tuple[reports.ReportBuilder, Diagnosis]:
    """Measure and explain the activations, stage by stage; return the report's rows and these."""
    builder = reports.ReportBuilder(comparison.calls, comparison.padding)
    if not comparison.calls:  # a trace of training steps alone
        return builder, Diagnosis([], [])
    stages = comparison.stages()
    results = compare(comparison, start("oracle", len(stages)))
    for stage, result in zip(stages, results, strict=True):
        builder.add(angles.allow(stage, result))
    if not diagnosing:
        return builder, Diagnosis([], [])
    return builder, diagnose(comparison, builder.rows, start)


def _compare_training(
    side: Side,
    checkpoint: Source,
    training: TrainingInput | None,
    start: Start,
    diagnosing: bool,
) -> TracedSteps:
    """Compare a training step, or all of a trace's."""
    if side.trace is not None:
        return compare_traced_steps(side.trace, checkpoint, start, diagnosing)
    assert training is not None
    batches = training.batches
    found = backend_training.compare_training(side, checkpoint, batches, start, diagnosing)
    rows, diagnosis, notes, unseen = found
    rows, notes = [*training.rows, *rows], [*training.notes, *notes]
    return TracedSteps(rows, diagnosis, notes, unseen, unjudged=[], judged=1)


def _training_entry(traced: TracedSteps, calls: Sequence[Call]) -> dict[str, Any]:
    """Return the report's part about training."""
    return {
        "rows": [reports.row_entry(row) for row in traced.rows],
        "notes": traced.notes,
        **reports.diagnosis_entries(traced.diagnosis, traced.rows, calls),
    }


def _header(
    settings: CompareConfig,
    checkpoint: Source,
    side: Side,
    calls: Sequence[Call],
    layers: tuple[int, int],
) -> dict[str, Any]:
    """Return the report's part about its inputs: both sides, precision, layers, calls."""
    n_tokens = sum(call.tokens.size for call in calls)
    title = f"{settings.ckpt}: oracle against {side.title}, {side.dtype}, {n_tokens} tokens in "
    title += counted(len(calls), "call")
    if side.trace is not None and side.trace.steps:
        title += f", {counted(len(side.trace.steps), 'training step')}"
    title += f", layers {layers[0]} to {layers[1] - 1}" if settings.layers else ""
    return {
        "schema": reports.SCHEMA,
        "title": title,
        "checkpoint": settings.ckpt,
        "against": settings.against,
        "dtype": side.dtype,
        "n_layers": checkpoint.config.n_layers,
        "layers": list(layers),
        "calls": [
            {"name": call.name, "after": call.after, "tokens": call.tokens.tolist()}
            for call in calls
        ],
    }
