"""What --tp shares: vocabulary, loss and positions, its collectives, and faults that are seen."""

import pickle
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_common.errors import InputError
from llama_torch.config import ParallelConfig, TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.training.parallel_layout import check_parallel_layout
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.optim import Hyperparameters

from ..conformance.strategies import random_params
from ..conformance.training_cases import STEPS_TOLERANCE, TrainingCase
from ..support.jobs import Command, Job, launch_command
from ..support.torch_training import distances, oracle_train
from ..workers.tensor_parallel_checks import LossCase
from ..workers.tensor_parallel_faults import FAULTS

pytestmark = pytest.mark.numeric

LOSSES = {
    "one more on the first": LossCase(19),
    "GPT-2's vocabulary": LossCase(50_257, z_loss=1e-2),
    "chunks of one row": LossCase(13, rows_of_chunk=1),
    # The parts' largest logits are further apart than float64's exponents reach.
    "far apart": LossCase(19, z_loss=1e-3, spread=1e4),
    "one row on the last of four": LossCase(10, z_loss=1e-2),
    "no target": LossCase(19, z_loss=1e-2, has_targets=False),
    "far apart in float32": LossCase(19, spread=1e3, dtype="float32"),
}
N_LAYERS, N_PROCESSES, ROWS, LENGTH, DIM = 2, 2, 2, 7, 16


def case() -> TrainingCase:
    """Return a case whose vocabulary and window two processes cannot share equally.

    Half of the positions of its causal window do not see the first.
    """
    rng = np.random.default_rng(1)
    config = LlamaConfig(DIM, N_LAYERS, 4, 2, 4, 20, 19, tie_embeddings=True)
    tokens, targets = rng.integers(0, 19, (2, ROWS, LENGTH))
    mask = np.tril(np.ones((ROWS, LENGTH, LENGTH), bool))
    mask[:, LENGTH // 2 :, 0] = False
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    hyper = Hyperparameters(lr=1e-2, grad_clip=0.05, z_loss=1e-2, warmup_steps=3, steps=12)
    return TrainingCase(
        config, random_params(config, 1), [Batch(tokens, targets, positions, mask)], hyper
    )


def make_job(world: int) -> Job:
    """Return the job of ``world`` processes, which runs all its checks."""

    def make(folder: Path) -> Command:
        asked: dict[str, Any] = {"losses": (list(LOSSES.values()),)}
        if world == N_PROCESSES:
            asked |= {"faults": (list(FAULTS), case()), "collectives": (case(),)}
            asked |= {"compiled": (case(),)}
        else:
            asked["checkpoint"] = case(), folder / "checkpoint"
        (folder / "in").write_bytes(pickle.dumps(asked))
        worker = "parity_tests.workers.tensor_parallel_checks"
        return launch_command(world, worker, folder / "in", folder / "out")

    return Job(make)


JOBS = {world: make_job(world) for world in (2, 4)}


@pytest.fixture(scope="module")
def checked():
    """Return a function from a number of processes to its job's results, by the check's name."""

    @lru_cache
    def of(world: int) -> dict[str, Any]:
        done = JOBS[world].done()
        assert done.returncode == 0, done.stderr
        return pickle.loads((JOBS[world].folder / "out").read_bytes())

    return of


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", JOBS)
def test_the_loss_of_a_shared_vocabulary_is_the_whole_ones(checked, world: int, name: str) -> None:
    found, expected = checked(world)["losses"][list(LOSSES).index(name)]
    tolerance = 1e-12 if LOSSES[name].dtype == "float64" else 1e-6
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.validation == pytest.approx(expected.loss, rel=tolerance)
    for field in ("d_head", "d_hidden"):
        mine, theirs = getattr(found, field), getattr(expected, field)
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), field


@pytest.mark.parametrize(("vocab_size", "is_refused"), [(9, True), (10, False), (50_257, False)])
def test_a_vocabulary_of_too_few_rows_is_refused(
    vocab_size: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 rows the first three of four processes have all."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    config = TrainConfig(ModelConfig(vocab_size=vocab_size), parallel=ParallelConfig(tp=4))
    config = replace(config, model=replace(config.model, n_heads=4, n_kv_heads=4), device="cpu")
    line = f"--tp 4 leaves its last process no row of --vocab-size {vocab_size}; choose a smaller"
    with pytest.raises(InputError, match=line) if is_refused else nullcontext():
        check_parallel_layout(config)


def test_a_step_is_the_oracles_without_a_fault(checked) -> None:
    errors = distances(checked(2)["faults"][""], oracle_train(case(), 1, np.float64))
    assert max(errors.values()) <= STEPS_TOLERANCE, errors


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(checked, fault: str) -> None:
    errors = distances(checked(2)["faults"][fault], oracle_train(case(), 1, np.float64))
    assert max(errors.values()) >= 1e4 * STEPS_TOLERANCE, errors


def test_a_compiled_step_is_the_oracles(checked) -> None:
    errors = distances(checked(2)["compiled"], oracle_train(case(), 2, np.float64))
    assert max(errors.values()) <= STEPS_TOLERANCE, errors


def test_a_checkpoint_is_whole_and_any_layout_reads_it(checked) -> None:
    """Written by two shards of two processes that share products, read by one and by four."""
    params = case().params
    for name, read in checked(4)["checkpoint"].items():
        assert read.keys() == params.keys()
        for key, value in params.items():
            assert np.array_equal(read[key], value.astype(np.float32)), (name, key)


def test_a_block_gathers_twice_and_scatters_twice_in_each_pass(checked) -> None:
    """And no process has the logits of another's part of the vocabulary."""
    calls, given, widest = checked(2)["collectives"]
    outside = {"all_gather_into_tensor": 3, "reduce_scatter_tensor": 2}
    # Outside blocks: the embedding, the last hidden states, and a chunk's sums of the loss.
    expected = {name: 4 * N_LAYERS + n for name, n in outside.items()}
    shared = {name: n for name, n in calls.items() if name in expected}
    assert shared == expected
    # The norms' weights; nothing as large as an activation.
    assert calls["all_reduce"] == 2 * N_LAYERS + 1
    assert given["all_reduce"] == 8 * DIM * calls["all_reduce"]
    assert given["reduce_scatter_tensor"] == 8 * ROWS * (LENGTH + 1) * DIM * (4 * N_LAYERS + 2)
    assert widest == 10  # of 19
