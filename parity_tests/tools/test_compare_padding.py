"""compare.py: outputs at padding are not judged; real tokens and other masks are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison.padding import find_padding
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import Call
from reference_np.checkpoint import Checkpoint
from reference_np.limits import real_tokens

from ..conformance.strategies import packed, padded
from ..planted.port import Planted
from .comparing import CONFIG, QUICK, named, silent


class Careless(Planted):
    """The planted port, which returns other values at padding, at and after the first layer."""

    def __init__(self, garbage: float, bug: str = "") -> None:
        super().__init__(bug)
        self.garbage = garbage

    def traced_decode(self, *arguments: Any) -> Any:
        found, cache = super().traced_decode(*arguments)
        mask, found = arguments[4], {name: value.copy() for name, value in found.items()}
        if mask is not None:
            padding = ~real_tokens(mask)[:, -arguments[2].shape[1] :]
            for value in found.values():
                value[padding] = self.garbage
        return found, cache


class OnlyPadded(Planted):
    """The planted port with a bug, in prompts with a mask alone."""

    def __init__(self, bug: str) -> None:
        super().__init__(bug)
        self.right = Planted()

    def traced_decode(self, *arguments: Any) -> Any:
        masked = arguments[4] is not None and len(arguments[4][0]) > 1
        return super().traced_decode(*arguments) if masked else self.right.traced_decode(*arguments)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30, 0.0, 7.0])
@pytest.mark.parametrize("shown", ["all", "logits"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_outputs_at_padding_are_not_judged(
    ckpt: Path, report: Callable, offer: Callable, garbage: float, shown: str, dtype: str
) -> None:
    port = Careless(garbage)
    spec = offer(silent(port) if shown == "logits" else port)
    found = report(ckpt, "--against", spec, "--dtype", dtype, *QUICK)
    assert found["verdict"]["holds"], found["verdict"]["line"]
    assert "Padding is not judged: 4 of 18 tokens of padded." in found["warnings"]
    (kl,) = (entry["kl"] for entry in found["logits"] if entry["name"] == "padded")
    assert sum(value is None for row in kl for value in row) == 4


@pytest.mark.parametrize("shown", ["all", "logits"])
def test_an_error_of_the_padded_run_alone_is_found(
    ckpt: Path, report: Callable, offer: Callable, shown: str
) -> None:
    port = OnlyPadded("silu_on_up")
    spec = offer(silent(port) if shown == "logits" else port)
    found = report(ckpt, "--against", spec, "--dtype", "float64", *QUICK)
    assert not found["verdict"]["holds"]
    names = [call["name"] for call in found["calls"]]
    wrong = {names[row["call"]] for row in found["rows"] if row["status"] == "diverges"}
    # The logits of the step are wrong as well: its cache is.
    assert wrong == {"padded", "padded, step 1"} if shown == "logits" else {"padded"}
    assert named(found) == [["silu_on_up"]]


@pytest.mark.parametrize("bug", ["silu_on_up", "mask_forgotten", "left_padding_in_positions"])
def test_garbage_at_padding_hides_no_bug(
    ckpt: Path, report: Callable, offer: Callable, bug: str
) -> None:
    spec = offer(Careless(np.nan, bug))
    found = report(ckpt, "--against", spec, "--dtype", "float64", *QUICK)
    assert [bug] in named(found)


def test_one_wrong_real_token_of_the_padded_run_fails(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    class Wrong(Careless):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            if arguments[4] is not None:
                found["logits"][1, -1] *= 1.01  # of the padded row
            return found, cache

    found = report(ckpt, "--against", offer(Wrong(np.nan)), *QUICK, "--no-diagnose")
    assert found["first_divergence"]["name"] == "logits"
    names = [call["name"] for call in found["calls"]]
    assert names[found["first_divergence"]["call"]] == "padded"
    assert "in 1 of 18 tokens" in found["first_divergence"]["where"]


def found_padding(
    *masks: np.ndarray | None, widths: tuple[int, ...], tokens: np.ndarray | None = None
) -> list[Any]:
    """Return the padding of a chain of calls with these masks and ``widths``, numbers of tokens.

    ``tokens``: of the whole chain [B, S]; else all are the same.
    """
    rows = next(len(mask) for mask in masks if mask is not None)
    tokens = np.zeros((rows, sum(widths)), int) if tokens is None else tokens
    parts = np.split(tokens, np.cumsum(widths)[:-1], axis=1)
    calls = [
        Call("", part, None, mask, None if c == 0 else c - 1)
        for c, (mask, part) in enumerate(zip(masks, parts, strict=True))
    ]
    return [None if where is None else where.tolist() for where in find_padding(calls)]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("blind", [True, False])
def test_padding_is_told_by_the_mask(left: bool, blind: bool) -> None:
    """Padding may attend to itself or, ``blind``, to nothing."""
    _, mask, real = padded([5, 2, 3], left)
    if blind:
        mask = mask & real[:, :, None]
    assert found_padding(mask, widths=(5,)) == [(~real).tolist()]


def test_padding_on_the_right_is_told_by_the_steps_after_it() -> None:
    """A single token of it, and a prompt without a mask."""
    step = np.array([[[True, True, False, True]]])
    assert found_padding(None, step, widths=(3, 1)) == [[[False, False, True]], None]
    _, mask, real = padded([3, 2], left=False)
    steps = np.concatenate([real, np.ones((2, 1), bool)], axis=1)[:, None]
    assert found_padding(mask, steps, widths=(3, 1)) == [(~real).tolist(), None]


def band(mask: np.ndarray) -> np.ndarray:
    """Return a sliding window of two keys."""
    return mask & ~np.tril(mask, -2)


# The tokens of two prefixes, as padding on the right that sees more or less would be.
ALL_OR_FIRST = np.tril(np.ones((1, 6, 6), bool))
ALL_OR_FIRST[:, 5, 2:] = False


@pytest.mark.parametrize(
    "mask",
    [
        packed([3, 4])[1],
        band(np.tril(np.ones((1, 6, 6), bool))),
        np.ones((1, 6, 6), bool),
        np.random.default_rng(0).random((40, 6, 6)) < 0.5,
        np.random.default_rng(1).random((40, 6, 6)) < 0.9,
        np.zeros((1, 4, 4), bool),
        np.tril(np.ones((1, 5, 5), bool)) & (np.arange(5) != 2),
        np.eye(6, dtype=bool)[None],
        np.broadcast_to(np.eye(6, dtype=bool), (3, 6, 6)),
        np.broadcast_to(np.arange(6) == 0, (1, 6, 6)),
        np.eye(6, dtype=bool)[None] | (np.arange(6) == 0),
        ALL_OR_FIRST,
        np.stack([np.tril(np.ones((6, 6), bool)), np.eye(6, dtype=bool)]),
    ],
    ids=[
        *("packed", "window", "all", "half", "most", "nothing", "hole", "itself", "itself, rows"),
        *("first", "first and itself", "all or first", "causal and itself"),
    ],
)
def test_other_masks_are_judged_whole(mask: np.ndarray) -> None:
    assert found_padding(mask, widths=(mask.shape[1],)) == [None]


@pytest.mark.parametrize(
    "mask",
    [
        packed([1, 1, 1, 3])[1],  # documents of one token, then one of three
        padded([6, 3], left=False)[1][1:],  # a prompt, then candidates that see it and themselves
    ],
    ids=["packed", "candidates"],
)
def test_padding_is_one_token_id(mask: np.ndarray) -> None:
    """A mask alone does not tell padding from tokens that stand for themselves."""
    assert found_padding(mask, widths=(6,), tokens=np.arange(6)[None]) == [None]
    assert found_padding(mask, widths=(6,)) != [None]


def test_a_prompt_of_one_token_is_told_by_the_steps_after_it() -> None:
    prompt = padded([3, 1], left=True)[1]
    step = np.ones((2, 1, 4), bool)
    step[1, :, :2] = False
    assert found_padding(prompt, widths=(3,)) == [None]
    left = [[False, False, False], [True, True, False]]
    assert found_padding(prompt, step, widths=(3, 1)) == [left, None]


@pytest.mark.parametrize("shows", ["all", "logits"])
def test_a_bug_shows_under_a_mask_by_which_each_token_sees_itself_alone(
    ckpt: Path, report: Callable, tmp_path: Path, shows: str
) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, (2, 8))
    mask = np.broadcast_to(np.eye(8, dtype=bool), (2, 8, 8))
    call = Call("alone", tokens, mask=mask)
    found, _ = Planted().traced_decode(CONFIG, dict(Checkpoint(ckpt)), tokens, None, mask, None)
    values = {name: value.copy() for name, value in found.items() if shows in ("all", name)}
    values["logits"][:, 2] *= 1.01

    def fill(writer: TraceWriter) -> None:
        for name, value in values.items():
            writer.add(0, name, value)

    path = tmp_path / "trace.safetensors"
    write_trace(path, CONFIG, [call], "float32", fill)
    report_found = report(ckpt, "--against", path, "--no-diagnose")
    assert report_found["first_divergence"]["name"] == "logits"
    assert "in 2 of 16 tokens" in report_found["first_divergence"]["where"]


def test_padding_that_a_later_step_sees_is_judged() -> None:
    _, mask, _ = padded([5, 2], left=True)
    assert found_padding(mask, None, widths=(5, 1)) == [None, None]
