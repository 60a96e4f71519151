"""The cells of the grid: what the checks of one column found for one package."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ..conformance.config_keys import ALSO_PLAIN, RIGHT_ALONE
from .causes import Cause

RED = ("failed", "passed unexpectedly")


class State(Enum):
    """The verdict of a cell; the worst of its checks decides. Value: its sign and its words."""

    FAILED = ("✗", "computes something else")
    UNCONFIRMED = ("?", "red, not yet confirmed")
    STOPPED = ("!", "stops with an error on a valid input; no number of it is wrong")
    HIDDEN = ("▫", "hidden: a plain directory of the package fails too")
    DOCUMENTED = ("≈", "right, with a documented difference")
    PASSED = ("✓", "right")
    NOT_COVERED = ("·", "not offered, or outside the declared limits")
    NOT_RUN = ("∅", "did not run to its end")

    @property
    def sign(self) -> str:
        return self.value[0]

    @property
    def words(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Column:
    """A question about a package: a title, the question, and the checks that answer it."""

    title: str
    question: str
    pattern: str  # a regular expression of the checks' ids

    def has(self, check: Mapping[str, Any]) -> bool:
        """Return whether a check belongs to the column."""
        return re.fullmatch(self.pattern, check["id"]) is not None


def _keys(words: str) -> str:
    return rf"test_key_of_config_json\[(?:{words})(?: .*)?\]"


SCALING = r"rope_(?:scaling|parameters)\."
NAMED = (  # the keys with a column of their own
    r"rms_norm_eps|(?:rope_parameters\.)?rope_theta|rope_scaling\.|rope_parameters\.|tie_word|num_at|"
    "num_key|head_dim"
)
COLUMNS = (
    Column(
        "logits", "the logits of a prompt, in its most precise type", "test_((causal|long)_)?logits"
    ),
    Column("float32", "logits in float32", r"test_logits_in\[float32\]"),
    Column("bfloat16", "logits in bfloat16", r"test_logits_in\[bfloat16\]"),
    Column("float16", "logits in float16", r"test_logits_in\[float16\]"),
    Column("padding", "prompts of unequal lengths in one batch", "test_pad(ding|ded_decoding)"),
    Column("packing", "several documents in one row", "test_packing"),
    Column(
        "cache",
        "tokens after a cache",
        "test_((chunked|long)_decoding|reused_cache|(long_)?engine)",
    ),
    Column("activations", "every activation inside", "test_(chunked_)?trace"),
    Column(
        "gradients",
        "gradients of a loss that the adapter takes of the logits",
        "test_loss_and_grads",
    ),
    Column("training", "whole training steps", r"test_training\[\d+\]"),
    Column("loader", "directories read by its own loader", "test_directory"),
    Column("epsilon", "rms_norm_eps of config.json", _keys("rms_norm_eps")),
    Column("base", "rope_theta of config.json", _keys(r"(?:rope_parameters\.)?rope_theta")),
    Column(
        "llama3",
        "rotary scaling of Llama 3.1, in config.json or given",
        _keys(f"{SCALING}(?:rope_type llama3|factor|low_.*|high_.*|original_.*)"),
    ),
    Column(
        "linear",
        "linear rotary scaling, in config.json or given",
        _keys(f"{SCALING}(?:rope_type linear|type.*)"),
    ),
    Column("tied", "tie_word_embeddings of config.json", _keys("tie_word_embeddings")),
    Column(
        "heads",
        "numbers of heads and head_dim of config.json",
        _keys("num_attention_heads|num_key_value_heads|head_dim"),
    ),
    Column(
        "others",
        "the other keys of config.json",
        rf"test_key_of_config_json\[(?!{NAMED}).*\]",
    ),
    Column(
        "refuses",
        "what it does not compute (biases, GELU, YaRN) is refused, not left out",
        r"test_unsupported_key\[.*\]",
    ),
)


@dataclass(frozen=True)
class Cell:
    """One cell: its state, the largest error as a share of its tolerance, and what it is made of.

    share     the largest over the checks; None where nothing finite was compared
    compared  the number of examples
    notes     a sentence for each reason of what is not covered, or of a documented difference
    reds      the failed checks, each with its backend's name and the cause where it is known
    """

    state: State
    share: float | None
    compared: int
    notes: tuple[str, ...]
    reds: tuple[tuple[str, dict[str, Any], Cause | None], ...]

    @property
    def cause(self) -> Cause | None:
        """The cause of the cell's state; None where nothing red is shown or none is known."""
        causes = [(check, cause) for _, check, cause in self.reds if cause]
        if self.state is not State.HIDDEN:
            causes = [
                (check, cause)
                for check, cause in causes
                if not _is_hidden(check) and _state_of_red(check, cause) is self.state
            ]
        return causes[0][1] if causes else None


def cell(result: Mapping[str, Any], column: Column, causes: Iterable[Cause]) -> Cell:
    """Return a package's cell in a column."""
    found = [
        (backend, check)
        for backend, run in result["runs"].items()
        for check in _checks(run, column)
    ]
    causes = list(causes)
    reds = [
        (backend, check, _cause(result["name"], backend, check, causes))
        for backend, check in found
        if check["verdict"] in RED
    ]
    shares = [check["worst_share"] for _, check in found if check["worst_share"] is not None]
    return Cell(
        _state(found, reds, any(_is_cut(run, column) for run in result["runs"].values())),
        max(shares, default=None),
        sum(check["compared"] for _, check in found),
        tuple(dict.fromkeys(note for _, check in found for note in _notes(check))),
        tuple(reds),
    )


def _checks(run: Mapping[str, Any], column: Column) -> list[dict[str, Any]]:
    """Return a backend's checks that answer a column's question.

    All that a backend with scaled frequencies alone computes is of the columns of their kinds.
    """
    checks: list[dict[str, Any]] = run["checks"]
    kinds = run.get("limits", {}).get("rope_types", ("default",))
    if "default" not in kinds:
        return checks if column.title in kinds else []
    return [check for check in checks if column.has(check)]


def used_causes(cells: Iterable[Sequence[Cell]], causes: Sequence[Cause]) -> list[Cause]:
    """Return the causes of the red checks in rows of cells, in the causes' order."""
    used = {cause for row in cells for one in row for *_, cause in one.reds if cause}
    return [cause for cause in causes if cause in used]


def without_cause(results: Iterable[Mapping[str, Any]], causes: Sequence[Cause]) -> Iterable[str]:
    """Yield a line for each red cell without a cause."""
    for result in results:
        for column in COLUMNS:
            if cell(result, column, causes).state is State.UNCONFIRMED:
                yield f"{result['name']}: {column.title}: red without a cause"


def without_red(results: Iterable[Mapping[str, Any]], causes: Iterable[Cause]) -> Iterable[str]:
    """Yield a line for each pattern of a cause that no red check has: what it explained is gone."""
    reds = [
        (result["name"], backend, check)
        for result in results
        for backend, run in result["runs"].items()
        for check in run["checks"]
        if check["verdict"] in RED
    ]
    for cause in causes:
        for pattern in cause.checks:
            alone = replace(cause, checks=(pattern,))
            if not any(alone.explains(*red) for red in reds):
                yield f"{cause.port}: {pattern}: no check is red by it ({cause.title})"


def _state(found: list[Any], reds: list[Any], is_cut: bool) -> State:
    verdicts = {check["verdict"] for _, check in found}
    shown = [red for red in reds if not _is_hidden(red[1])]
    if shown:
        return max((_state_of_red(*red[1:]) for red in shown), key=SEVERITY.index)
    # One of the package's backends may show what a fault of every directory hides from another.
    passed = {check["id"] for _, check in found if check["verdict"] == "passed"}
    if any(not _is_right_alone(check) and check["id"] not in passed for _, check, _ in reds):
        return State.HIDDEN
    if "incomplete" in verdicts or is_cut:
        return State.NOT_RUN
    if reds:
        return State.PASSED
    if any(check["documented"] for _, check in found):
        return State.DOCUMENTED
    return State.PASSED if "passed" in verdicts else State.NOT_COVERED


def _is_cut(run: Mapping[str, Any], column: Column) -> bool:
    """Return whether a backend's run ended before its answer, which may be another than theirs."""
    return ("error" in run or "over" in run) and not _checks(run, column)


def _is_hidden(check: Mapping[str, Any]) -> bool:
    """Return whether a key of config.json failed where a directory of usual values does too."""
    message = (check["failure"] or {}).get("message", "")
    return ALSO_PLAIN in message or RIGHT_ALONE in message


def _is_right_alone(check: Mapping[str, Any]) -> bool:
    """Return whether a key is read rightly, though each directory fails by another."""
    return RIGHT_ALONE in (check["failure"] or {}).get("message", "")


def _notes(check: Mapping[str, Any]) -> Iterable[str]:
    if check["verdict"] == "not covered" and check.get("reason"):
        yield check["reason"]
    for reason in check["not_covered"]:
        yield f"not covered: {reason}"
    for limit in check["outside_limits"]:
        yield f"not covered, by limit: {limit}"
    if _is_right_alone(check):
        yield f"read rightly; {check['failure']['message'].partition('; ')[2]}"
    for reason in check["documented"]:
        yield f"documented difference: {reason}"


# What one red check is, from the least to the worst.
SEVERITY = (State.DOCUMENTED, State.STOPPED, State.FAILED, State.UNCONFIRMED)
RAISED = re.compile(r"(?:^|from_directory failed: )[A-Za-z]+(?:Error|Exception)\b")


def _state_of_red(check: Mapping[str, Any], cause: Cause | None) -> State:
    """Return what a failed check is: in a random one a wrong number outweighs an error."""
    if cause is None:
        return State.UNCONFIRMED
    if cause.documented:
        return State.DOCUMENTED
    is_raised = RAISED.search((check["failure"] or {}).get("message", ""))
    return State.STOPPED if is_raised and (check["worst_share"] or 0) <= 1 else State.FAILED


def _cause(name: str, backend: str, check: Mapping[str, Any], causes: list[Cause]) -> Cause | None:
    return next((cause for cause in causes if cause.explains(name, backend, check)), None)
