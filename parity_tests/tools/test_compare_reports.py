"""compare.py's report on the terminal, as a page and in JSON: all say the same, and all of it."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_parity.comparison import progress, replayed_step, trace_training
from llama_parity.comparison.report_rows import judged_kl, short_name
from reference_np.training_mutants import TRAINING

from ..backends.torch_model import save_numpy
from ..planted.port import Planted
from .comparing import QUICK, QUICK_CALLS, contents, silent, write
from .traced_steps import CONFIG as TRAINED_CONFIG
from .traced_steps import HYPER, traced, trained

INPUTS = ("tokens", "positions", "mask", "targets")


def text_of(page: Path) -> str:
    """Return the text of a page without its plots."""
    body = page.read_text("utf-8").partition("<body>")[2]
    body = re.sub(r"<svg.*?</svg>", "", body, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "\n", body))


def logprobs_alone(ckpt: Path, run: Callable, path: Path, keeps: Callable[[int], bool]) -> Path:
    """Write the log-probabilities of the oracle for some calls, and finite ones alone."""
    run(ckpt, "--trace", path, *QUICK)
    metadata, tensors = contents(path)
    kept = {
        name: value
        for name, value in tensors.items()
        if name.endswith(INPUTS)
        or (name.endswith("target_logprobs") and keeps(int(name.split(".")[1])))
    }
    save_numpy(kept, path, metadata)
    return path


def test_how_much_each_call_shows_is_said_in_the_same_words(
    ckpt: Path, run: Callable, offer: Callable, tmp_path: Path
) -> None:
    page = tmp_path / "x.html"
    trace = logprobs_alone(ckpt, run, tmp_path / "trace.safetensors", lambda c: c == 0)
    for argv, lines in (
        (("--against", offer(silent(Planted()))), ["4 of 4 calls offer their logits alone"]),
        (
            ("--against", trace),
            [
                "1 of 4 calls show log-probabilities of targets alone (8 tokens)",
                "3 of 4 calls not covered: the trace has no output of it (padded; padded, step 1; "
                "position 2,040 on)",
            ],
        ),
    ):
        flags = QUICK if argv[1] != trace else ()
        _, out, _ = run(ckpt, *argv, *flags, "--html", page)
        for line in lines:
            assert line in out.splitlines()
            assert line in text_of(page).splitlines()
        assert out.splitlines()[-1] in text_of(page).splitlines()


def test_a_page_without_layers_or_calls_has_no_empty_sections(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    page = tmp_path / "x.html"
    trace = logprobs_alone(ckpt, run, tmp_path / "trace.safetensors", lambda c: True)
    run(ckpt, "--against", trace, "--html", page)
    assert "Error by depth" not in text_of(page)
    assert text_of(page).count("target_logprobs") >= 2  # in both tables
    path = write(tmp_path / "trained.safetensors", TRAINED_CONFIG)
    steps = traced(path, trained(path))
    out = run(path, "--against", steps, "--html", page)[1]
    assert "Training step" in text_of(page)
    assert "Activations" not in text_of(page)
    assert "nothing compared" not in text_of(page)
    assert out.splitlines()[-1] in text_of(page).splitlines()


@pytest.mark.parametrize("change", ["none", "NaN", "shape"])
def test_calls_that_one_of_two_engines_lacks_are_listed(
    ckpt: Path, run: Callable, tmp_path: Path, change: str
) -> None:
    one = logprobs_alone(ckpt, run, tmp_path / "a.safetensors", lambda c: True)
    other = logprobs_alone(ckpt, run, tmp_path / "b.safetensors", lambda c: change != "none" or c)
    metadata, tensors = contents(other)
    name = "call.0.target_logprobs"
    if change == "NaN":
        tensors[name][0, 0] = np.nan
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1]
    save_numpy(tensors, other, metadata)
    page, report = tmp_path / "x.html", tmp_path / "x.json"
    argv = ("--against", one, "--beside", other, "--html", page, "--json", report)
    _, out, _ = run(ckpt, *argv)
    line = f"Not compared with those of {other}, since one trace has none, or none that is finite:"
    assert f"{line} 8 tokens." in out.splitlines()
    assert f"{line} 8 tokens." in text_of(page).splitlines()
    found = json.loads(report.read_text())["engines"]
    assert found["not_compared"] == ["8 tokens"]
    assert [entry["name"] for entry in found["calls"]] == ["padded", "position 2,040 on"]


def test_every_row_of_the_report_is_in_the_page(
    ckpt: Path, run: Callable, offer: Callable, tmp_path: Path
) -> None:
    page, report = tmp_path / "x.html", tmp_path / "x.json"
    spec = offer(Planted("silu_on_up"))
    files = ("--html", page, "--json", report)
    _, out, _ = run(ckpt, "--against", spec, *QUICK, *files, "--all", "--no-diagnose")
    listed = [line.split()[:1] for line in out.splitlines() if not line.startswith("logits of ")]
    rows = json.loads(report.read_text())["rows"]
    cells = [part.split("</td>")[0] for part in page.read_text("utf-8").split("<tr><td><code>")]
    names = [cell.removesuffix("</code>") for cell in cells[1:]]
    for name in {row["name"] for row in rows}:
        assert names.count(name) >= QUICK_CALLS  # those that diverge are listed twice
        assert listed.count([name]) == QUICK_CALLS
    diverging = sum(row["status"] == "diverges" for row in rows)
    assert f"diverges: {diverging}, " in text_of(page)
    assert f"All {len(rows)} rows" in text_of(page)


def test_no_divergence_is_negative(ckpt: Path, report: Callable) -> None:
    """Though the sum that it is rounds to less than zero here and there."""
    found = report(ckpt, "--dtype", "float64")
    assert min(value for entry in found["logits"] for value in judged_kl(entry)) == 0


def test_a_step_in_which_known_bugs_are_tried_counts_them(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "trained.safetensors", TRAINED_CONFIG)
    trace = traced(path, trained(path, "clip_always", hyper=replace(HYPER, grad_clip=1e3)))
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    _, _, err = run(path, "--against", trace)
    counts = re.findall(r"known training bugs: (\d+) of (\d+)", err)
    assert (str(len(TRAINING)), str(len(TRAINING))) in counts
    assert {of for _, of in counts} == {str(len(TRAINING))}


def test_known_bugs_are_tried_on_the_first_wrong_steps_alone(
    tmp_path: Path, report: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the training step some thirty times."""
    path, tried = write(tmp_path / "trained.safetensors", TRAINED_CONFIG), []
    real = replayed_step.diagnose_step
    monkeypatch.setattr(trace_training, "MOST_DIAGNOSED", 1)
    monkeypatch.setattr(
        replayed_step, "diagnose_step", lambda *args: (tried.append(1), real(*args))[1]
    )
    values = [dict(found) | {"loss": found["loss"] * np.float32(1.1)} for found in trained(path)]
    found = report(path, "--against", traced(path, values))
    assert len(tried) == 1
    assert "The known bugs were not tried on step 1." in found["training"]["notes"]
    wrong = [r["name"] for r in found["training"]["rows"] if r["status"] == "diverges"]
    assert wrong == ["step 0 loss", "step 1 loss"]


def test_the_gradient_of_the_final_norm_is_no_norm_of_gradients() -> None:
    name = "step 0 grad model.norm.weight"
    assert short_name({"name": name}) == name
    layer = "step 0 grad model.layers.0.mlp.up_proj.weight"
    assert short_name({"name": layer}) == "step 0 grad layers.0.mlp.up_proj"
