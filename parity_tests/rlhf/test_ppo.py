"""Whole batches of PPO through the trainer's own loop are those of the oracle, in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_torch.rlhf import ppo_rollouts

from ..support.ppo_faults import FAULTS
from ..support.ppo_runs import CLOSE, SETTINGS, Models, distance, run_loop, write_models

pytestmark = pytest.mark.numeric

SEEN = 1e-5  # 10,000 times what is allowed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_oracles(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two or three answers in one forward pass, where none has a gradient.
    monkeypatch.setattr(ppo_rollouts, "BATCH_TOKENS", 80)
    ran = run_loop(models.run(name), tmp_path / "run", monkeypatch)
    assert [len(one.answers) for one in ran.drawn] == [12, 12]
    ended = [a.ids[-1] in ran.source.end_ids for one in ran.drawn for a in one.answers]
    assert 0 < sum(ended) < len(ended)
    assert ("value.weight" in ran.last) == ("group" not in name)
    assert distance(ran) < CLOSE
    assert any(update.clipped for update in ran.updates)
    moved = [np.abs(ran.last[key] - value).max() for key, value in ran.first.items()]
    assert min(moved) > 1e-3


@pytest.mark.under_mutants
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_loop_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None],
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    ran = run_loop(models.run(FAULTS[fault]), tmp_path / "run", monkeypatch)
    assert distance(ran) > SEEN
