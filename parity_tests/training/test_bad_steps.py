"""Steps with a loss or gradient that is not finite or too large end the run or are skipped."""

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch import train
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.training_state import load_state
from llama_torch.data import corpus
from llama_torch.training import bad_steps, batch, loop, setup, step
from llama_torch.training import source as batch_source

from ..support.survival import STEPS, call_before, numbers, require_same, resume, send_signal
from ..support.trainer_runs import scalars
from ..workers.killed_trainer import require_readable

# Bad steps


def spoil(kinds: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give these steps (from 1) a bad loss or gradient, by ``kinds``."""
    real = step.accumulate

    def accumulate(*given: Any) -> Any:
        loss, grads = real(*given)
        kind = kinds.get(train_step.step, "")
        if kind == "gradient":
            next(iter(grads.values())).view(-1)[0] = math.inf
        return torch.full_like(loss, float(kind)) if kind not in ("", "gradient") else loss, grads

    def train_step(*args: Any, accept: Any, **kwargs: Any) -> Any:
        (train_step.step,) = accept.args
        return step.train_step(*args, accept=accept, **kwargs)

    monkeypatch.setattr(step, "accumulate", accumulate)
    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("nan", "its loss is nan (at most 32.47 is sane)"),
        ("inf", "its loss is inf"),
        ("32.5", "its loss is 32.5 "),
        ("gradient", "its gradient norm inf"),
    ],
)
def test_a_bad_step_ends_the_run_before_its_update(
    kind: str,
    named: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, models = tmp_path / "run", []
    spoil({3: kind}, monkeypatch)
    monkeypatch.setattr(
        setup, "build", lambda *a, real=setup.build: models.append(real(*a)) or models[-1]
    )
    assert train.main([*flags, "--log-every", "100", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "error: step 3 is bad" in error
    assert named in error
    assert "training tokens " in error
    assert "(the last checkpoint stands)" in error
    saved = load_state(step_folders.newest(out))
    assert saved[1:] == (2, [])
    for name, parameter in models[0][0].named_parameters():
        assert torch.equal(parameter, saved[0][f"parameter.{name}"])


def test_the_windows_of_a_bad_step_are_those_it_read(
    flags: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[torch.Tensor] = []
    cut = batch.to_batch
    monkeypatch.setattr(batch, "to_batch", lambda part: read.append(part) or cut(part))
    spoil({4: "nan"}, monkeypatch)
    corpora = []
    load = corpus.load_corpus
    monkeypatch.setattr(
        batch_source, "load_corpus", lambda *a: corpora.append(load(*a)) or corpora[-1]
    )
    assert train.main([*flags, "--grad-accum", "2", "--out", str(tmp_path / "run")]) == 2
    spans = capsys.readouterr().err.partition("training tokens ")[2].partition(";")[0]
    ends = [map(int, span.split("-")) for span in spans.split(", ")]
    (source,) = corpora[0].sources
    named = [torch.from_numpy(source.train[a : b + 1].astype("int64")) for a, b in ends]
    assert torch.equal(torch.stack(named), torch.cat(read[-2:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_skipped_steps_change_nothing_and_are_remembered(
    dtype: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = [*flags, "--keep-last", "9", "--skip-bad-steps", "--dtype", dtype]
    spoil({1: "nan", 3: "gradient", 5: "40"}, monkeypatch)
    assert train.main([*flags, "--out", str(whole)]) == 0
    assert "3 bad steps skipped: 1, 3, 5\n" in capsys.readouterr().out
    assert scalars(whole)["train/bad_steps"] == [(1, 1.0), (3, 2.0), (5, 3.0)]
    states = {n: load_state(whole / "checkpoints" / str(n)) for n in range(1, STEPS + 1)}
    assert states[STEPS][2] == [1, 3, 5]
    for skipped, previous in ((3, 2), (5, 4)):
        one, other = states[skipped][0], states[previous][0]
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = states[2][0], states[4][0]
    assert not all(torch.equal(one[name], other[name]) for name in one)
    for stop_at in (1, 3, 4):
        with monkeypatch.context() as patch:
            call_before("train_step", stop_at, lambda: send_signal(signal.SIGINT), patch)
            assert train.main([*flags, "--out", str(parted)]) == 130
        assert resume(parted) == 0
        require_same(whole, parted)
        shutil.rmtree(parted)


def test_a_run_that_stopped_at_a_bad_step_continues_over_it(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    spoil({3: "nan"}, monkeypatch)
    assert train.main([*flags, "--skip-bad-steps", "--out", str(whole)]) == 0
    assert train.main([*flags, "--out", str(parted)]) == 2
    assert resume(parted) == 2
    assert resume(parted, "--skip-bad-steps") == 0
    require_same(whole, parted)
    spoil(dict.fromkeys(range(2, 20), "nan"), monkeypatch)
    more = ["--steps", "20", "--skip-bad-steps", "--out", str(tmp_path / "other")]
    assert train.main([*flags, *more]) == 2
    assert "10 bad steps in a row, the last of them step 11" in capsys.readouterr().err


@given(
    steps=st.lists(st.tuples(numbers, numbers), max_size=6),
    vocab_size=st.integers(1, 100_000),
    z_loss=st.sampled_from([0.0, 1e-4]),
)
def test_a_gpus_guard_finds_the_first_bad_step(
    steps: list[tuple[float, float]], vocab_size: int, z_loss: float
) -> None:
    """On a device that is not waited for; the same judgement as where it is."""
    largest, cpu = bad_steps.largest_loss(vocab_size, z_loss), torch.device("cpu")
    later, at_once = (
        bad_steps.BadSteps(largest, cpu, lambda i: f"windows {i}", []) for _ in range(2)
    )
    later.checks_before_update = False
    most = 3 * math.log(vocab_size)
    most += z_loss * most**2
    bad = 0
    for number, (loss, norm) in enumerate(steps, 1):
        good = math.isfinite(loss) and math.isfinite(norm) and loss <= most
        tensors = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)
        # A norm above float32's largest is infinite.
        good = good and bool(tensors[1].isfinite())
        assert later.accept(number, *tensors)
        if good:
            assert at_once.accept(number, *tensors)
        else:
            with pytest.raises(InputError, match=f"step {number} is bad"):
                at_once.accept(number, *tensors)
            bad = bad or number
    at_once.raise_if_bad()
    if bad:
        with pytest.raises(InputError, match=f"step {bad} is bad.*windows {bad - 1}"):
            later.raise_if_bad()
    else:
        later.raise_if_bad()


def test_what_a_gpu_trained_after_a_bad_step_is_not_saved(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = bad_steps.BadSteps.__init__

    def unwaited(self: bad_steps.BadSteps, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self.checks_before_update = False

    monkeypatch.setattr(bad_steps.BadSteps, "__init__", unwaited)
    spoil({3: "gradient"}, monkeypatch)
    often = {"log": "100", "eval": "100", "save": "2"}
    for name in often:
        out = tmp_path / name
        every = [f"--{key}-every={'5' if key == name != 'save' else often[key]}" for key in often]
        assert train.main([*flags, *every, "--out", str(out)]) == 2
        assert "step 3 is bad: its loss is 10.8" in capsys.readouterr().err
        assert step_folders.newest(out).name == "2"
        require_readable(out)
