"""A run that no memory holds is refused before anything is read, made or allocated."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_common import memory as host
from llama_common.errors import InputError
from llama_torch import train
from llama_torch.config import TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.training import setup, source, step
from llama_torch.training.batch import to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.memory import Layout, Need, require_run_memory, step_needs

from ..support.trainer_runs import SMALL_RUN, TEXT, refused

SMALL = ModelConfig(16, 3, 4, 2, 4, 24, 60, 8)
LLAMA_7B = ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096, tie_embeddings=False)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--dim 1000000000", "--dim 1000000000, "),
        ("--head-dim 1000000000", "--head-dim 1000000000, "),
        ("--hidden-dim 2000000000", "--hidden-dim 2000000000, "),
        ("--vocab-size 2000000000", "--vocab-size 2000000000: "),
        ("--n-layers 1000000000", "--n-layers 1000000000: "),
        ("--batch-size 1000000000", "--batch-size 1000000000, "),
        ("--batch-size 2147483648", "--batch-size 2147483648, "),
        ("--max-seq-len 1000000000", "--max-seq-len 1000000000, "),
        ("--grad-accum 1000000000", "--grad-accum 1000000000, "),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_sizes_beyond_the_machine_are_refused_with_the_figure(
    flags: str,
    named: str,
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def reached(*args: object) -> None:
        raise AssertionError("data or model was reached")

    monkeypatch.setattr(source, "load_corpus", reached)
    monkeypatch.setattr(setup, "build", reached)
    monkeypatch.setattr(setup, "host_memory", lambda: 64 * GIB)  # some machine has room for these
    out = tmp_path / "run"
    line = refused([*SMALL_RUN, "--out", str(out), *flags.split(), *more], capsys)
    assert named in line
    assert "this run takes at least " in line
    assert f"this machine has {host.gib(64 * GIB)}; choose smaller ones" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dim 2147483648", "--dim must be below 2^31, got 2147483648"),
        ("--head-dim 2147483648", "--head-dim must be below 2^31, got 2147483648"),
        ("--vocab-size 1000000000000", "--vocab-size must be below 2^31, got 1000000000000"),
        ("--steps 9223372036854775808", "--steps times --batch-size and --grad-accum must be"),
        (
            "--n-layers 2000000000 --verify-every 1",
            "--verify-every needs some 32,723.0 GiB of host",
        ),
        ("--num-workers 1000000000", "--num-workers must lie between 0 and 1024"),
    ],
)
def test_numbers_that_nothing_counts_to_are_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert message in refused([*SMALL_RUN, "--out", str(out), *flags.split()], capsys)
    assert not out.exists()


def test_an_endless_number_of_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In hexadecimal Python reads more digits than it writes."""
    for key in ("steps", "dim", "lr", "sample_prompt"):
        (tmp_path / "run.toml").write_text(f"{key} = 0x{'f' * 5000}\n")
        line = refused(["--config", str(tmp_path / "run.toml")], capsys)
        assert f"--config {tmp_path / 'run.toml'}: {key} " in line
        assert "an integer of thousands of digits" in line


def test_a_run_whose_record_claims_too_much_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    assert train.main([*SMALL_RUN, "--data", str(text), "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    for part in (record["settings"]["model"], record["identity"]["model"]):
        part["n_layers"] = 2_000_000_000
    record.pop("sha256", None)
    (out / "run.json").write_text(json.dumps(record))
    assert "--n-layers 2000000000" in refused(["--resume", "--out", str(out)], capsys)


def in_bytes(needs: list[Need], *kinds: str) -> int:
    return sum(need.n_bytes for need in needs if need.kind in kinds)


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_moments_are_those_of_a_step(
    tied: bool, dtype: str, micro_batches: int
) -> None:
    model_config = dataclasses.replace(SMALL, tie_embeddings=tied)
    config = TrainConfig(model_config, batch_size=1, grad_accum=micro_batches)
    config = dataclasses.replace(config, dtype=dtype)
    model, optimizer = setup.build(
        config.model, config.optim, 0, getattr(torch, dtype), torch.device("cpu")
    )
    batches = [to_batch(rows) for rows in torch.randint(60, (micro_batches, 9)).split(1)]
    _, grads = step.accumulate(model, batches)
    step.clip_and_step(model, optimizer, grads, lr=0.1, grad_clip=1.0)
    seen = [*model.parameters(), *grads.values()]
    for state in optimizer.state.values():
        seen += [tensor for name, tensor in state.items() if name != "step"]
    needs = step_needs(config, Layout())
    assert in_bytes(needs, "weights", "gradients and moments") == storage_bytes(seen)


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_forward_pass_keeps_is_at_least_what_is_estimated(
    dtype: str, recompute: str
) -> None:
    config = dataclasses.replace(TrainConfig(SMALL, batch_size=512), dtype=dtype)
    model, _ = setup.build(
        config.model, config.optim, 0, getattr(torch, dtype), torch.device("cpu")
    )
    compile_blocks(model, "no", recompute)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        hidden, _ = model.model(torch.randint(60, (512, 8)))
    needs = step_needs(config, Layout())
    assert in_bytes(needs, "activations") > in_bytes(needs, "weights")
    assert in_bytes(needs, "activations") <= storage_bytes([*kept, hidden])
    assert storage_bytes([*kept, hidden]) < 40 * in_bytes(needs, "activations")


def test_processes_share_what_they_shard() -> None:
    config = TrainConfig(LLAMA_7B, dtype="bfloat16", batch_size=8)
    whole, sharded = step_needs(config, Layout()), step_needs(config, Layout(4, 2, 4, 8))
    assert in_bytes(whole, "weights") == 4 * 6_738_415_616
    # Matrices are cut in eight, the norms' weights in four; shards' gradients are float32.
    norms = 65 * 4096
    expected = 4 * ((6_738_415_616 - norms) // 8 + norms // 4)
    assert in_bytes(sharded, "weights") == expected
    assert in_bytes(sharded, "gradients and moments") == 3 * expected
    assert in_bytes(whole, "gradients and moments") == 10 * 6_738_415_616
    many = dataclasses.replace(config, batch_size=512)
    kept = [in_bytes(step_needs(many, Layout(1, tp)), "activations") for tp in (1, 2)]
    assert kept[0] == 2 * kept[1] > 0


def test_a_gpu_is_compared_with_its_own_memory() -> None:
    config = TrainConfig(LLAMA_7B, dtype="bfloat16", batch_size=1)
    require_run_memory(config, Layout(), 128 * GIB, 141 * GIB)
    with pytest.raises(InputError, match=r"takes at least 87\.9 GiB .* the GPU has 80\.0 GiB"):
        require_run_memory(config, Layout(), 128 * GIB, 80 * GIB)
    require_run_memory(config, Layout(fsdp=2, data_size=1, local=2), 128 * GIB, 80 * GIB)
    with pytest.raises(InputError, match=r"25\.1 GiB .* initial weights, and this machine has 16"):
        require_run_memory(config, Layout(), 16 * GIB, 141 * GIB)
    with pytest.raises(InputError, match="for 8 processes"):
        require_run_memory(config, Layout(data_size=8, local=8), 128 * GIB, 141 * GIB)


def test_runs_that_fit_are_let_through() -> None:
    for config in (TrainConfig(dtype="float32"), TrainConfig(SMALL, dtype="bfloat16")):
        require_run_memory(config, Layout(), GIB, None)
        require_run_memory(config, Layout(data_size=2, local=2), GIB, GIB)


def test_the_smallest_limit_of_the_groups_around_a_process_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max\n"), (inner.parent, "4096\n"), (tmp_path, "8192\n")):
        (folder / "memory.max").write_text(limit)
    (tmp_path.parent / "memory.max").write_text("1\n")  # outside the tree of groups
    assert min(host._limits(tmp_path, "/a/b", "memory.max")) == 4096
    assert min(host._limits(tmp_path, "/elsewhere", "memory.max")) == 8192
    assert 0 < host.host_memory() < 1 << 60
