"""compare.py: the place and the name of a planted bug, and no name for other errors."""

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison import kept_params, progress
from llama_parity.comparison.replay import RoundedParams
from reference_np.config import LlamaConfig
from reference_np.mutants import FORWARD

from ..planted.bugs import BUGS
from ..planted.port import Planted
from .comparing import CALLS, CONFIG, QUICK, QUICK_CALLS, Edited, named, silent, write

# The first activation that an operation of the catalogue makes.
MADE_BY = {
    "apply_rope": "q_rope",
    "rope_tables": "q_rope",
    "next_positions": "q_rope",
    "group_queries": "attn",
    "attention_scores": "attn",
    "masked_softmax": "attn",
    "causal_mask": "attn",
    "extend": "attn",
    "merge_heads": "attn_proj",
    "rms_norm": "attn_norm",
    "swiglu": "ffn",
    "add": "attn_residual",
    "linear": "q",
}
READ_BY = {"weights_unpermuted": "q", "k_permuted_as_q": "k"}  # the other two: the head


def expected_place(bug: str) -> str:
    mutant = next(mutant for mutant in FORWARD if mutant.name == bug)
    if mutant.operation == "read":
        return READ_BY.get(bug, "logits")
    return MADE_BY[mutant.operation]


def steps(bug: str) -> int:
    """Return 1 for a bug that shows only where positions and mask follow from the cache."""
    return int(bug.startswith("positions_") or bug == "mask_top_left")


def test_every_known_bug_is_planted() -> None:
    assert set(BUGS) == {mutant.name for mutant in FORWARD}


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [(bug, "float64") for bug in sorted(BUGS)]
    + [(mutant.name, "float32") for mutant in FORWARD if mutant.known_by != "value"]
    + [("norm_eps_tenth", "float32"), ("norm_inverted", "float32")],
)
def test_a_planted_bug_is_located_and_named(
    tmp_path: Path, report: Callable, offer: Callable, bug: str, dtype: str
) -> None:
    """The bug is planted in torch, independently of the catalogue; no other bug is named."""
    size = {"max_seq_len": 2048, "rope_theta": 5e5, "tie_embeddings": bug == "tied_head_random"}
    size |= {"rope_type": "llama3", "rope_factor": 8.0} if "scaling" in bug else {}
    path = write(tmp_path / "x.safetensors", LlamaConfig(32, 1, 4, 2, 8, 48, 60, **size))
    spec = offer(Planted(bug))
    argv = ("--against", spec, "--dtype", dtype, "--tokens", 24, "--steps", steps(bug))
    found = report(path, *argv)
    assert found["first_divergence"]["name"].split(".")[-1] == expected_place(bug)
    assert named(found) == [[bug]]
    assert found["unexplained"] == 0
    wrong = [row for row in found["rows"] if row["status"] == "diverges"]
    assert found["diagnosis"][0]["explains"] == found["diverging"] == len(wrong)
    assert found["diagnosis"][0]["against"] == 0


# A row whose positions are all shifted by the same has the same logits: rotations are relative.
HARMLESS = {"left_padding_in_positions"}
# At the end of a whole model an error has any size for any reason; no bug is named by it.
BY_VALUE = {mutant.name for mutant in FORWARD if mutant.known_by == "value"}


@pytest.mark.parametrize("bug", sorted(BY_VALUE - HARMLESS))
def test_a_planted_bug_is_named_by_the_logits_alone(
    ckpt: Path, tmp_path: Path, report: Callable, offer: Callable, bug: str
) -> None:
    """From logits alone, it is among the few bugs that this input cannot tell apart."""
    if "scaling" in bug:
        scaled = dataclasses.replace(CONFIG, rope_type="llama3", rope_factor=8.0)
        ckpt = write(tmp_path / "scaled.safetensors", scaled)
    argv = (ckpt, "--against", offer(silent(Planted(bug))), "--dtype", "float64")
    found = report(*argv, "--tokens", 8, "--steps", steps(bug))
    assert found["verdict"]["expected"] == QUICK_CALLS + 2 * steps(bug)
    assert found["first_divergence"]["name"] == "logits"
    assert "the whole model" in found["first_divergence"]["operation"]
    guilty = named(found)
    assert len(guilty) == 1
    assert bug in guilty[0]
    assert len(guilty[0]) <= 3


class Damaged(Planted):
    """The planted port without a bug, on damaged weights."""

    def __init__(self, damage: Callable[[str, np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.damage = damage

    def traced_decode(self, config: LlamaConfig, params: Any, *rest: Any) -> Any:
        changed = {name: self.damage(name, params[name]) for name in params}
        return super().traced_decode(config, changed, *rest)


def scaled(part: str, factor: float) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, value: value * value.dtype.type(factor) if part in name else value


@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj", "model.norm", "up_proj", "lm_head"])
@pytest.mark.parametrize(
    ("factor", "shown"), [(1.0001, "all"), (1.003, "all"), (1.003, "logits"), (2.0, "logits")]
)
def test_no_bug_is_named_for_what_is_none(
    ckpt: Path, report: Callable, offer: Callable, part: str, factor: float, shown: str
) -> None:
    """The error is as large as some rounding's, which would touch more elements."""
    port = Damaged(scaled(part, factor))
    spec = offer(silent(port) if shown == "logits" else port)
    found = report(ckpt, "--against", spec, *QUICK)
    assert not found["verdict"]["holds"]
    assert found["diagnosis"] == []
    assert found["unexplained"] == found["diverging"] > 0


def test_a_bug_that_changes_nothing_explains_nothing(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    """An error just beyond its bound is within that bound of the oracle's float32 values."""

    def rough(value: np.ndarray) -> np.ndarray:
        return value * (1 + 9e-7 * np.where(np.arange(value.shape[-1]) % 2, 1, -1)).astype("f4")

    found = report(ckpt, "--against", offer(Edited("layers.1.ffn_proj", rough)), *QUICK)
    assert {row["name"] for row in found["rows"] if row["status"] == "diverges"} == {
        "layers.1.ffn_proj"
    }
    assert found["diagnosis"] == []


def test_a_finding_is_tried_on_every_layer(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """One bug in all of six layers, and in the fourth another error that it does not explain."""

    class Mixed(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            return found | {"layers.3.q": found["layers.3.q"] * np.float32(1.1)}, cache

    path = write(tmp_path / "deep.safetensors", LlamaConfig(16, 6, 2, 1, 8, 24, 60))
    found = report(path, "--against", offer(Mixed("silu_on_up")), *QUICK)
    assert named(found) == [["silu_on_up"]]
    assert found["diagnosis"][0]["explains"] == 6 * QUICK_CALLS
    # The rotation of the q that the trace shows is wrong as well.
    assert found["unexplained"] == 2 * QUICK_CALLS
    assert found["diverging"] == 8 * QUICK_CALLS


class Two(Planted):
    """Two planted bugs at once."""

    def __init__(self, *bugs: str) -> None:
        super().__init__()
        for bug in bugs:
            vars(self.ops).update(BUGS[bug])


PAIRS = [
    ("norm_eps_tenth", "silu_on_up"),  # in different places
    ("rope_interleaved", "rope_theta_ignored"),  # in one activation
    ("scores_unscaled", "mask_forgotten"),
]


@pytest.mark.parametrize("bugs", PAIRS)
def test_two_bugs_at_once(
    ckpt: Path, report: Callable, offer: Callable, bugs: tuple[str, ...]
) -> None:
    argv = ("--against", offer(Two(*bugs)), "--dtype", "float64", *QUICK)
    found = report(ckpt, *argv)
    assert {name for names in named(found) for name in names} == set(bugs)
    assert found["unexplained"] == 0


@pytest.mark.parametrize(
    "bugs",
    [
        ("norm_variance", "silu_on_up"),
        ("rope_interleaved", "scores_unscaled"),  # neither changes the first token
        ("mask_forgotten", "silu_on_up"),  # one lets tokens attend to later ones
    ],
)
def test_two_bugs_by_the_logits_alone(
    ckpt: Path, report: Callable, offer: Callable, bugs: tuple[str, str]
) -> None:
    argv = ("--against", offer(silent(Two(*bugs))), "--dtype", "float64", *QUICK)
    found = named(report(ckpt, *argv))
    assert sorted(found[-1]) == sorted(bugs)
    # A forgotten mask does nothing in the padded run, which has its own: the other bug is alone.
    assert found[:-1] in ([], [["silu_on_up"]])


def test_a_diagnosis_by_the_logits_alone_takes_seconds(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """Of four layers, and where no bug explains the logits, so that all pairs are tried."""
    config = LlamaConfig(128, 4, 8, 4, 16, 344, 4000, max_seq_len=2048)
    path = write(tmp_path / "four.safetensors", config)
    spec = offer(silent(Damaged(scaled("up_proj", 1.05))))
    before = time.process_time()
    found = report(path, "--against", spec, "--dtype", "float64")
    assert time.process_time() - before < 30
    assert found["unexplained"] == found["diverging"] == CALLS


def test_a_diagnosis_by_the_logits_alone_reads_a_small_model_once(
    ckpt: Path, run: Callable, offer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells how far it is, stage by stage; and a large model is not kept."""
    read: Counter[str] = Counter()
    real = RoundedParams.__getitem__

    def counting(params: RoundedParams, name: str) -> np.ndarray:
        read[name] += 1
        return real(params, name)

    monkeypatch.setattr(RoundedParams, "__getitem__", counting)
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    argv = (ckpt, "--against", offer(silent(Damaged(scaled("up_proj", 1.05)))), *QUICK)
    err = run(*argv)[2]
    for name in ("known bugs, 1 token", "pairs of bugs, 1 token", "bugs that fit, all tokens"):
        counts = [int(n) for n in re.findall(rf"^{name}: (\d+) of ", err, re.MULTILINE)]
        assert len(set(counts)) > CONFIG.n_layers + 2
    most = max(read.values())
    read.clear()
    run(*argv, "--no-diagnose")
    assert most == max(read.values()) + 1
    monkeypatch.setattr(kept_params, "MOST_KEPT", 1000)
    read.clear()
    run(*argv)
    assert max(read.values()) > most + 5


def test_a_long_run_through_a_pipe_is_not_silent(
    ckpt: Path, run: Callable, offer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    _, out, err = run(ckpt, "--against", offer(Planted("silu_on_up")), *QUICK, "--json", "-")
    json.loads(out)  # the lines are on standard error
    lines = err.splitlines()
    assert any(re.fullmatch(r"oracle: 4 of 4 \(\d+ s\)", line) for line in lines)
    assert any(line.startswith("known bugs: 7 of ") for line in lines)


def test_a_bug_beyond_a_missing_stream_is_no_crash(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    class Worse(Edited):
        def __init__(self) -> None:
            super().__init__("layers.0.residual", lambda x: None)
            vars(self.ops).update(BUGS["silu_on_up"])

    found = report(ckpt, "--against", offer(Worse()), *QUICK)
    assert named(found) == [["silu_on_up"]]
    assert found["unexplained"] == 0  # the oracle computes the missing stream from its inputs
