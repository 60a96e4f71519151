"""Run variants of the oracle, each with some known bugs, on some calls and stages.

All variants run one stage before the next, so that its parameters are read once. Where a stage
looks up no operation that a bug replaces, its activations are the bug-free oracle's, and it is not
run again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from reference_np.model import Ops
from reference_np.mutants import Mutant
from reference_np.ops import Array

from .comparison import Comparison
from .replay import (
    Activations,
    CachedParams,
    Key,
    Replay,
    TablesAndMask,
    is_layer,
    stage_input,
    tables_and_masks,
)
from .trace_format import Call, call_chain

Bugs = tuple[Mutant, ...]


def with_bugs(bugs: Iterable[Mutant], ops: Ops) -> Ops:
    """Return the operations with every one of ``bugs`` in them."""
    namespace = SimpleNamespace(**vars(ops))
    for bug in bugs:
        namespace = bug.apply(namespace)
    return namespace


def replaced_operations(bugs: Iterable[Mutant]) -> set[str]:
    """Return the names of the operations that bugs replace."""
    return {name for bug in bugs for name in (bug.operation, *bug.also)}


class LookupRecorder(SimpleNamespace):
    """Operations that record the name of each one that is looked up, in ``used``."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(recorded=ops, used=set())

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self.recorded, name)


class CallSubset:
    """Some calls with all that they continue, renumbered, and the other side's activations."""

    def __init__(self, calls: Sequence[Call], wanted: Iterable[int], theirs: Activations) -> None:
        self.indices = sorted({at for c in wanted for at in call_chain(calls, c)})
        renumbered = {c: index for index, c in enumerate(self.indices)}
        self.calls = [
            call._replace(after=None if call.after is None else renumbered[call.after])
            for call in (calls[c] for c in self.indices)
        ]
        self.theirs = {
            (renumbered[c], name): value for (c, name), value in theirs.items() if c in renumbered
        }

    def with_original_indices(self, activations: Activations) -> dict[Key, Array]:
        """Return activations under the indices that their calls had before."""
        return {(self.indices[index], name): value for (index, name), value in activations.items()}

    def has_stage_input(self, stage: int) -> bool:
        """Return whether the other side shows the residual stream that a stage reads, of all."""
        name = stage_input(stage)
        return not name or all((c, name) in self.theirs for c in range(len(self.calls)))


def run_variants(
    comparison: Comparison,
    suspects: Sequence[Bugs],
    subset: CallSubset,
    stages: Sequence[int],
    theirs: Activations | None = None,
    words: Array | None = None,
) -> Iterator[tuple[int, dict[Key, Array], bool]]:
    """Run the oracle with each suspect's bugs, in the precision under test.

    Yield the suspect's index, a stage's values, and whether they are the bug-free oracle's.
    ``theirs``, with the indices of the subset, makes the runs teacher-forced. ``words``: the ids of
    the vocabulary for which the head computes logits; None for all.
    """
    config, params = comparison.config, comparison.baseline_params
    recorder = LookupRecorder(comparison.baseline_ops)
    inputs = tables_and_masks(config, subset.calls, params.dtype, recorder)
    input_ops = recorder.used  # those that tables and masks are computed by
    bug_free = Replay(config, subset.calls, params, recorder, inputs=inputs)
    variants = _variants(comparison, suspects, subset, inputs, input_ops)
    diverged = [False] * len(suspects)  # whose residual streams are not the bug-free ones
    for stage in stages:
        stage_params, recorder.used = CachedParams(params), set()
        if stage == config.n_layers and words is not None:
            for replay in (bug_free, *variants):
                replay.ops = _with_few_words(replay.ops, words)
        values = subset.with_original_indices(bug_free.run(stage, theirs, stage_params))
        used = recorder.used | (input_ops if is_layer(config, stage) else set())
        is_given = theirs is not None and subset.has_stage_input(stage)
        for index, (bugs, replay) in enumerate(zip(suspects, variants, strict=True)):
            is_untouched = used.isdisjoint(replaced_operations(bugs))
            diverged[index] = not (is_untouched and (is_given or not diverged[index]))
            if diverged[index]:
                run = replay.run(stage, theirs, stage_params)
                yield index, subset.with_original_indices(run), False
            else:
                replay.copy_state(bug_free)
                yield index, values, True


def _variants(
    comparison: Comparison,
    suspects: Sequence[Bugs],
    subset: CallSubset,
    inputs: list[TablesAndMask],
    input_ops: set[str],
) -> list[Replay]:
    """Return a replay with each suspect's bugs; those with the same tables and masks share.

    ``inputs`` are the bug-free tables and masks, ``input_ops`` what they are computed by.
    """
    params = comparison.baseline_params
    computed: dict[tuple[str, ...], list[TablesAndMask]] = {(): inputs}
    replays = []
    for bugs in suspects:
        ops = with_bugs(bugs, comparison.baseline_ops)
        of_inputs = tuple(
            bug.name for bug in bugs if not input_ops.isdisjoint(replaced_operations([bug]))
        )
        if of_inputs not in computed:
            computed[of_inputs] = tables_and_masks(
                comparison.config, subset.calls, params.dtype, ops
            )
        replays.append(
            Replay(comparison.config, subset.calls, params, ops, inputs=computed[of_inputs])
        )
    return replays


def _with_few_words(ops: Ops, words: Array) -> Ops:
    """Return operations whose ``linear``, the head's, takes the rows ``words`` of its weight."""
    linear: Callable[[Array, Array], Array] = ops.linear
    if isinstance(ops, LookupRecorder):  # the operations beneath it, and what it recorded
        namespace: SimpleNamespace = LookupRecorder(ops.recorded)
        namespace.used = ops.used
        namespace.used.add("linear")
    else:
        namespace = SimpleNamespace(**vars(ops))
    namespace.linear = lambda x, weight: linear(x, weight[words])
    return namespace
