"""PPO on two processes is that of one: moments, counts and the mismatch are of all answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_common.errors import InputError
from llama_torch import ppo
from llama_torch.checkpoint.file_names import MODEL_FILE
from llama_torch.distributed.parallel import Parallel
from llama_torch.ppo_config import PpoConfig
from llama_torch.rlhf.ppo_rewards import whiten
from llama_torch.rlhf.ppo_task import PpoTask
from llama_torch.training.origin import Origin
from reference_np import masked

from ..support.jobs import Command, Job, launch_command
from ..support.ppo_runs import RUN, write_models
from ..support.trainer_runs import scalars

ROUNDING = 1e-4  # float32 steps at a large learning rate, whose sums are taken in another order
LAYOUTS = {"value": [], "group": ["--advantages", "group", "--group", "2"]}


def flags_of(folder: Path, layout: list[str], name: str = "run") -> list[str]:
    models = write_models(folder)
    evaluated = ["--val-fraction", "0.3", "--eval-batches", "0", "--eval-every", "3"]
    return [*RUN, *models.flags, *evaluated, *layout, "--lr", "1e-3", "--out", str(folder / name)]


def make_job(layout: list[str]) -> Job:
    def make(folder: Path) -> Command:
        return launch_command(2, "llama_torch.ppo", *flags_of(folder, layout))

    return Job(make)


JOBS = {name: make_job(layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_learn_what_one_does(name: str, tmp_path: Path) -> None:
    done, folder = JOBS[name].done(), JOBS[name].folder
    assert done.returncode == 0, done.stderr
    assert ppo.main(flags_of(tmp_path, LAYOUTS[name])) == 0
    mine, theirs = folder / "run", tmp_path / "run"
    first, second = scalars(mine), scalars(theirs)
    for tag in ("loss", "grad_norm", "reward", "kl", "entropy", "value_loss", "length", "ended"):
        own, other = dict(first["train/" + tag]), dict(second["train/" + tag])
        assert len(other) == 6
        assert own == pytest.approx(other, rel=ROUNDING, abs=1e-5), tag
    for tag in ("val/loss", "val/reward", "val/length"):
        own, other = dict(first[tag]), dict(second[tag])
        assert {*other} == {0, 3, 6}
        assert own == pytest.approx(other, rel=ROUNDING, abs=1e-5), tag
    weights, others = load_file(mine / MODEL_FILE), load_file(theirs / MODEL_FILE)
    for key, weight in weights.items():
        assert (weight - others[key]).norm() <= ROUNDING * others[key].norm(), key


def test_groups_that_processes_would_share_are_refused() -> None:
    config = PpoConfig(advantages="group", group=64)
    parallel = Parallel()
    parallel.data_size = 2
    said = "--group 64: 2 processes take 32 answers each of a minibatch"
    with pytest.raises(InputError, match=said):
        PpoTask().open_source(config, Origin(config.model), parallel)


class OneOf(Parallel):
    """A process of several, which is given the others' numbers."""

    def __init__(self, rank: int, others: Sequence[Tensor]) -> None:
        super().__init__()
        self.data_rank, self.data_size, self.others = rank, len(others) + 1, others

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Add what the others have in their rows."""
        places = [i for i in range(self.data_size) if i != self.data_rank]
        for place, other in zip(places, self.others, strict=True):
            tensor[place] += other
        return tensor


def test_whitening_joins_the_moments_of_all_processes() -> None:
    """One process's own moments, the bug of slime#2235 and miles#3229, give another result."""
    rng = np.random.default_rng(0)
    parts = [(100 + rng.standard_normal((n, 4)), rng.random((n, 4)) < 0.7) for n in (3, 5, 2)]
    every = [masked.moments(*part) for part in parts]
    joint = masked.join_moments(every)
    for rank, part in enumerate(parts):
        others = [
            torch.tensor(each, dtype=torch.float64) for i, each in enumerate(every) if i != rank
        ]
        values, mask = map(torch.from_numpy, part)
        found = whiten(values, mask, OneOf(rank, others)).numpy()
        np.testing.assert_allclose(found, masked.whiten(*part, joint=joint), rtol=0, atol=1e-12)
        own = whiten(values, mask, Parallel()).numpy()
        assert np.abs(own - found).max() > 1e-3
