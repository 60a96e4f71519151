"""Training steps of several processes equal the oracle's in every parallel layout."""

import math
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_torch.model.llama import Llama
from llama_torch.training.clip import global_norm, norm_of
from reference_np.config import LlamaConfig
from reference_np.optim import Hyperparameters
from reference_np.tolerances import UNIT_ROUNDOFF

from ..conformance.strategies import random_params
from ..conformance.training_cases import STEPS_TOLERANCE, TrainingCase, random_batch
from ..support.devices import on_every_device
from ..support.jobs import Command, Job, launch_command
from ..support.torch_training import Trained, distances, oracle_train
from ..workers.distributed_steps import STEPS, Layout, train

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parent.parent.parent

LAYOUTS = {
    2: [Layout(1, 1), Layout(2, 1), Layout(1, 2)],  # DDP, FSDP2, tensor parallelism
    4: [Layout(2, 1), Layout(2, 2), Layout(1, 2), Layout(1, 4), Layout(0, 1)],  # and combined
}

# Of bfloat16 gradients, by the number of processes: two batches each in shards, one each in
# shards of replicas, and in replicas.
BFLOAT16 = {
    2: [Layout(2, 1, "bfloat16"), Layout(2, 1, "bfloat16", 1)],
    4: [Layout(2, 1, "bfloat16", 1), Layout(1, 1, "bfloat16", 1)],
}


def trainings(world: int) -> list[tuple[Layout, int]]:
    """Return the trainings of one job: layouts and indices of cases."""
    layouts = LAYOUTS[world] + BFLOAT16[world]
    return [(layout, i) for layout in layouts for i in range(len(cases()))]


def make_job(world: int) -> Job:
    """Return the job of ``world`` processes, which runs all its trainings."""

    def make(folder: Path) -> Command:
        jobs = [(layout, cases()[i]) for layout, i in trainings(world)]
        (folder / "in").write_bytes(pickle.dumps(jobs))
        worker = "parity_tests.workers.distributed_steps"
        return launch_command(world, worker, folder / "in", folder / "out")

    return Job(make)


JOBS = {world: make_job(world) for world in LAYOUTS}

NAMED = [
    pytest.param(
        world,
        layout,
        id=f"{world // (layout.fsdp or world) // layout.tp} replicas x "
        f"{layout.fsdp or world} shards x {layout.tp} tensor-parallel",
    )
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


def cases() -> list[TrainingCase]:
    """Return cases of four batches of different shapes and counts of valid targets.

    Query heads share keys, and no number of processes divides the vocabulary, or every length.
    """
    found = []
    for seed, (tied, clip, z_loss) in enumerate([(False, 1e3, 0.0), (True, 0.05, 1e-2)]):
        rng = np.random.default_rng(seed)
        config = LlamaConfig(16, 2, 8, 4, 6, 20, 19, tie_embeddings=tied)
        batches = [random_batch(rng, config, custom) for custom in (False, True, True, False)]
        hyper = Hyperparameters(lr=1e-2, grad_clip=clip, z_loss=z_loss, warmup_steps=3, steps=12)
        found.append(TrainingCase(config, random_params(config, seed), batches, hyper))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_large_gradient(dtype: torch.dtype) -> None:
    """Torch's float32 sum is too small by 5e-4 here."""
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (2**23 + 5, 3, 0)]
    grads = [grad.to(dtype) for grad in grads]
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert global_norm(grads).item() == pytest.approx(exact, rel=1e-6)
    assert norm_of(grads).dtype == torch.float32


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_hundred_million_equal_elements(device: str, dtype: torch.dtype) -> None:
    """All squares round the same way; torch's norm is too small by 4% on a CPU."""
    grad = torch.full((10**8,), 0.1, dtype=dtype, device=device)
    assert norm_of([grad]).item() == pytest.approx(1e4 * grad[0].item(), rel=1e-6)


@pytest.fixture(scope="module")
def trained():
    """Return a function from a number of processes to its job's results, by (layout, case)."""

    @lru_cache
    def of(world: int) -> dict[tuple[Layout, int], tuple[Trained, dict[str, int]]]:
        done = JOBS[world].done()
        assert done.returncode == 0, done.stderr
        found = pickle.loads((JOBS[world].folder / "out").read_bytes())
        return dict(zip(trainings(world), found, strict=True))

    return of


@pytest.mark.parametrize("case", range(2), ids=["untied", "tied, clipped"])
@pytest.mark.parametrize(("world", "layout"), NAMED)
def test_a_step_of_many_is_the_oracles(trained, world: int, layout: Layout, case: int) -> None:
    actual, _ = trained(world)[layout, case]
    expected = oracle_train(cases()[case], STEPS, np.float64)
    errors = distances(actual, expected)
    assert max(errors.values()) <= STEPS_TOLERANCE, errors
    assert actual.losses[0] != actual.losses[-1]


@pytest.mark.parametrize(("world", "layout"), NAMED)
def test_each_holds_its_share(trained, world: int, layout: Layout) -> None:
    _, local_sizes = trained(world)[layout, 0]
    shards = layout.fsdp or world
    params = random_params(cases()[0].config, 0)
    assert local_sizes == {n: share(n, v.shape, layout.tp, shards) for n, v in params.items()}


def share(name: str, shape: tuple[int, ...], tp: int, shards: int) -> int:
    """Return the first process's elements of a parameter: a part of a matrix's part for --tp."""
    rows, *rest = shape
    columns = math.prod(rest)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        columns //= tp
    elif len(shape) == 2:
        rows = -(-rows // tp)
    return -(-rows // shards) * columns


def test_bfloat16_shards_compute_what_a_bfloat16_model_computes(
    trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are equal to float64's rounding: gathered weights are the rounded masters."""
    monkeypatch.setattr(Llama, "init_part", Llama.init_part)  # train replaces it
    actual, _ = trained(2)[BFLOAT16[2][0], 0]
    alone, _ = train(Layout(1, 1, "bfloat16"), cases()[0])
    assert actual.losses[0] == pytest.approx(alone.losses[0], rel=1e-12)
    assert actual.norms == pytest.approx(alone.norms, rel=2**-8)


@pytest.mark.parametrize("case", range(2), ids=["untied", "tied, clipped"])
@pytest.mark.parametrize(
    ("world", "layout", "roundings"),
    [
        pytest.param(2, BFLOAT16[2][1], 0.0, id="shards"),
        pytest.param(4, BFLOAT16[4][0], 0.0, id="both"),
        pytest.param(4, BFLOAT16[4][1], 0.5, id="replicas"),
    ],
)
def test_bfloat16_gradients_are_added_up_in_float32(
    trained,
    world: int,
    layout: Layout,
    roundings: float,
    case: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over processes and micro-batches as on one process; replicas round the sum once.

    The average rounding is 0.42 of the largest; a sum over four in bfloat16 would err by half as
    much again.
    """
    monkeypatch.setattr(Llama, "init_part", Llama.init_part)  # train replaces it
    actual, _ = trained(world)[layout, case]
    alone, _ = train(Layout(1, 1, "bfloat16", 1), cases()[case])
    pairs = [(actual.exp_avg[name], exact) for name, exact in alone.exp_avg.items()]
    error = math.sqrt(sum(float(np.sum((found - exact) ** 2)) for found, exact in pairs))
    size = math.sqrt(sum(float(np.sum(exact**2)) for _, exact in pairs))
    assert error / size <= roundings * UNIT_ROUNDOFF["bfloat16"] + 1e-6
