"""Write the oracle's own trace of a comparison's calls, and of its training step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reference_np import optim
from reference_np.grad import Batch
from reference_np.ops import Array
from reference_np.optim import Hyperparameters

from .comparison import Comparison
from .logprobs import has_targets, with_targets
from .replay import EMBEDDING_STAGE, Replay
from .source import Source, open_checkpoint
from .trace_file import TraceFile, TraceWriter, write_trace
from .trace_format import Call, Step
from .training_step import with_gradients
from .training_task import HYPERPARAMETERS, clip_limits


def write_oracle_trace(
    path: Path,
    comparison: Comparison,
    checkpoint: Source,
    trace: TraceFile | None,
    batches: Sequence[Batch] | None,
) -> None:
    """Write the oracle's activations and log-probabilities, in the dtype under test.

    With ``batches`` also a training step that takes them and clips. ``trace``: the other side's,
    whose own targets are kept.
    """
    config, precision = checkpoint.config, comparison.precision
    given: Sequence[Call] = trace.calls if trace is not None else comparison.calls
    calls = [
        call if has_targets(call) else call._replace(targets=None)
        for call in with_targets(given, comparison.padding)
    ]
    results: Mapping[str, Array] = {}
    hyper = None
    if batches is not None:
        hyper, results = _training_step(comparison, checkpoint, batches)

    def fill(writer: TraceWriter) -> None:
        oracle = Replay(config, calls, comparison.baseline_params, comparison.baseline_ops)
        for stage in range(EMBEDDING_STAGE, config.n_layers + 1):
            for (c, name), value in oracle.run(stage).items():
                writer.add(c, name, value)
        for name, value in results.items():
            writer.add_step(0, name, value)

    steps = [] if batches is None else [Step(batches)]
    write_trace(path, config, given, precision, fill, steps=steps, hyperparameters=hyper)


def _training_step(
    comparison: Comparison, checkpoint: Source, batches: Sequence[Batch]
) -> tuple[Hyperparameters, dict[str, Array]]:
    """Return the hyperparameters of a step that clips, and the results of the oracle's."""
    params = dict(open_checkpoint(checkpoint.path, comparison.precision))
    z_loss = HYPERPARAMETERS.z_loss
    loss_and_grads = optim.accumulate(params, batches, checkpoint.config, z_loss)
    hyper = replace(HYPERPARAMETERS, grad_clip=clip_limits(loss_and_grads[1])["clipped"])
    new, state, metrics = optim.train_step(
        params,
        optim.init_state(params),
        batches,
        checkpoint.config,
        hyper,
        rules=with_gradients(loss_and_grads),
    )
    found: dict[str, Any] = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
    kinds = {
        "grad": metrics.grads,
        "param": new,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
    }
    found |= {f"{kind}.{n}": x for kind, values in kinds.items() for n, x in values.items()}
    return hyper, {name: np.asarray(x, comparison.precision) for name, x in found.items()}
