"""predict.py: its bytes are those that torch moves in a small job, its seconds a formula's."""

import pickle
from collections import Counter
from pathlib import Path

import pytest

from llama_torch.model.config import ModelConfig
from llama_torch.model.shapes import parameter_count
from tools import predict
from tools.benchmarks.communication import ALONE, BACKWARD, REPLICATE, SHARD, Mesh, Transfer
from tools.benchmarks.communication import transfers as transfers_of
from tools.benchmarks.scaling_model import MEASURED, Machines, Work, meshes, predicted, seconds_of
from tools.benchmarks.scaling_model import predict as predict_step
from tools.shapes import SHAPES

from ..support.documents import ROOT
from ..support.jobs import Command, Job, launch_command
from ..workers.counted_collectives import Call, Step

WORLD = 4
SMALL = ModelConfig(16, 2, 4, 4, 4, 32, 64, 8, tie_embeddings=False)
TIED = ModelConfig(16, 2, 8, 4, 4, 32, 64, 8, tie_embeddings=True)
STEPS = {
    "replicas": Step(SMALL, 1, 1, 2, 1),
    "replicas, two micro-batches": Step(SMALL, 1, 1, 2, 2),
    "replicas, tied": Step(TIED, 1, 1, 2, 1),
    "shards": Step(SMALL, 4, 1, 2, 1),
    "shards, two micro-batches": Step(SMALL, 4, 1, 2, 2),
    "replicas of shards": Step(TIED, 2, 1, 2, 2),
    "tensor-parallel": Step(SMALL, 1, 4, 4, 2),
    "shards of tensor-parallel": Step(SMALL, 2, 2, 2, 1),
    "replicas of tensor-parallel": Step(TIED, 1, 2, 2, 1),
}
CONTROL_BYTES = 8  # of a number that processes agree on: the count of targets, loss, norm


def counted(folder: Path) -> Command:
    (folder / "in").write_bytes(pickle.dumps(list(STEPS.values())))
    worker = "parity_tests.workers.counted_collectives"
    return launch_command(WORLD, worker, folder / "in", folder / "out")


COUNTED = Job(counted)


def expected(step: Step) -> list[Transfer]:
    mesh = Mesh(WORLD // step.fsdp // step.tp, step.fsdp, step.tp)
    return transfers_of(step.model, mesh, step.rows * step.model.max_seq_len, step.micro_batches)


@pytest.mark.parametrize("name", STEPS)
def test_the_bytes_are_those_that_torch_moves(name: str) -> None:
    """In each kind of call, among as many processes; and but for DDP's buckets in as many calls."""
    done = COUNTED.done()
    assert done.returncode == 0, done.stderr
    found = dict(zip(STEPS, pickle.loads((COUNTED.folder / "out").read_bytes()), strict=True))
    calls = [c for c in found[name] if c.processes > 1 and c.n_bytes > CONTROL_BYTES]
    transfers = expected(STEPS[name])
    moved: Counter[tuple[str, int]] = Counter()
    for call in calls:
        moved[call.kind, call.processes] += call.n_bytes
    predicted_bytes: Counter[tuple[str, int]] = Counter()
    for one in transfers:
        predicted_bytes[one.kind, one.processes] += round(one.calls * one.n_bytes)
    assert moved == predicted_bytes
    if STEPS[name].fsdp * STEPS[name].tp > 1:
        each = Counter[Call]()
        for one in transfers:
            each[Call(one.kind, one.processes, int(one.n_bytes))] += one.calls
        assert Counter(calls) == each


def test_bytes_of_a_wrong_layout_would_be_seen() -> None:
    """No two of the small job's layouts move the same."""
    totals = [
        tuple((t.kind, t.processes, t.n_bytes, t.calls) for t in expected(step))
        for step in STEPS.values()
    ]
    assert len(set(totals)) == len(totals)


def test_a_gpu_sends_what_a_ring_sends() -> None:
    n = parameter_count(SHAPES["1.1b"])
    sent = {
        mesh: sum(one.sent for one in transfers_of(SHAPES["1.1b"], mesh, 1))
        for mesh in (Mesh(replicas=8), Mesh(fsdp=8))
    }
    assert sent[Mesh(replicas=8)] == pytest.approx(2 * 7 / 8 * 4 * n, rel=1e-6)
    outer = 2 * 32000 * 2048 + 2048  # gathered once, a block's weights twice
    assert sent[Mesh(fsdp=8)] == pytest.approx(7 / 8 * (8 * n - 2 * outer), rel=1e-6)


@pytest.mark.parametrize(
    ("mesh", "axis", "processes", "gb_a_second", "latency"),
    [
        (Mesh(fsdp=8), SHARD, 8, 450, 7 * 3.4e-6),
        (Mesh(fsdp=16), SHARD, 16, 400, 14 * 3.4e-6 + 14e-6),  # eight cards of a host
        (Mesh(fsdp=8, tp=4), SHARD, 8, 100, 4 * 3.4e-6 + 3 * 14e-6),  # two of them
        (Mesh(2, fsdp=8), REPLICATE, 2, 50, 14e-6),  # one
    ],
)
def test_seconds_are_those_of_the_slowest_link_and_of_the_steps(
    mesh: Mesh, axis: str, processes: int, gb_a_second: float, latency: float
) -> None:
    n_bytes, calls = 10**9, 3
    one = Transfer("all_gather", axis, processes, n_bytes, calls, BACKWARD)
    wire = n_bytes * (processes - 1) / processes / (gb_a_second * 1e9)
    assert seconds_of(one, mesh, Machines()) == pytest.approx(calls * (latency + wire))


def test_an_all_reduce_of_many_takes_a_trees_latency() -> None:
    one = Transfer("all_reduce", REPLICATE, 512, 0, 1, ALONE)
    tree = 2 * (7 * 4e-6 + 6 * 14e-6)
    assert seconds_of(one, Mesh(replicas=512), Machines()) == pytest.approx(tree)


def test_one_gpu_waits_for_nobody() -> None:
    found = predict_step(Work(SHAPES["1.1b"], 8, 74_000), Mesh(), Machines())
    assert (found.speed, found.worst_speed, found.moving) == (pytest.approx(74_000),) * 2 + (0,)


def test_slow_links_are_waited_for() -> None:
    work, slow = Work(SHAPES["1.1b"], 8, 74_000), Machines(per_host=1, network=1e9)
    for mesh in meshes(work.model, 64, 8):
        found = predict_step(work, mesh, slow)
        assert found.worst_speed <= found.speed < 0.2 * 64 * 74_000


def test_the_page_has_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Its two tables, and how far the best case is off at most."""
    assert predict.main([]) == 0
    page = (ROOT / "docs" / "distributed.md").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15
    assert not [line for line in lines if line not in page.splitlines()]
    seven = predict.PredictConfig(shape="7b", windows=1, speed=11_704, gpus=(8, 64, 512))
    cells = [" | ".join(row) for row in predict.predicted_rows(seven) if row[1].startswith("FSDP")]
    assert [row for row in cells if f"| 7B | {row} |" in page]
    off = [predicted(row).speed / row.speed - 1 for row in MEASURED]
    assert f"{min(off):.0%} to {max(off):.0%} too fast" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "12"], "--gpus must each be below --per-host 8, or a multiple of it"),
        (["--gpus", "0"], "--gpus must each lie between 1 and"),
        (["--windows", "0"], "--windows must lie between 1 and"),
        (["--speed", "0"], "--speed must be positive and finite"),
        (["--network", "nan"], "--network must be positive and finite"),
        (["--shape", "8b"], "--shape"),
    ],
)
def test_what_cannot_be_predicted(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
