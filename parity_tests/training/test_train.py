"""The trainer: its step, its schedule, and runs that survive being stopped."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_torch import generate, train
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.hf import load_model
from llama_torch.checkpoint.training_state import STATE_FILE
from llama_torch.common.errors import InputError
from llama_torch.config import OptimConfig
from llama_torch.distributed.parallel import Parallel
from llama_torch.model import loss as loss_module
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.loss import IGNORE, _pieces, backward_loss, count_valid, loss_sum
from llama_torch.training import batch, run_dir, step, validate
from llama_torch.training.optimizer import learning_rate, make_adamw
from tools import compare

from ..conformance.strategies import seeds
from ..support.trainer_runs import SMALL_RUN, TEXT, refused, scalars, stop_after

TINY = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=60)


def fresh_model(seed: int = 0) -> Llama:
    model = Llama(TINY)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.double()


def random_batch(rng: np.random.Generator, rows: int, length: int) -> batch.Batch:
    tokens = torch.from_numpy(rng.integers(0, TINY.vocab_size, (rows, length)))
    targets = torch.from_numpy(rng.integers(0, TINY.vocab_size, (rows, length)))
    targets[torch.from_numpy(rng.random((rows, length)) < 0.4)] = IGNORE
    return batch.Batch(tokens, targets)


@given(seed=seeds, rows=st.integers(2, 5), length=st.integers(2, 9), data=st.data())
def test_a_step_does_not_depend_on_its_split(
    seed: int, rows: int, length: int, data: st.DataObject
) -> None:
    """Micro-batches with unequal counts of valid targets: a mean of means would differ."""
    rng = np.random.default_rng(seed)
    tokens, targets, *_ = random_batch(rng, rows, length)
    targets[0, 0] = 1  # at least one counts
    cut = data.draw(st.integers(1, rows - 1), label="cut")
    results = []
    for parts in ([slice(0, rows)], [slice(0, cut), slice(cut, rows)]):
        model = fresh_model()
        optimizer = make_adamw(model, OptimConfig())
        loss, norm = step.train_step(
            model,
            optimizer,
            [batch.Batch(tokens[part], targets[part]) for part in parts],
            lr=1e-2,
            grad_clip=0.5,
        )
        results.append((loss, norm, *(p.detach() for p in model.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class OneOf(Parallel):
    """One of several processes that share out windows; it keeps what it adds to their total."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.data_rank, self.data_size, self.added = rank, world, torch.zeros(2).double()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        self.added = values
        return torch.ones(2)


@given(seed=seeds, n_batches=st.integers(1, 7), world=st.integers(1, 5))
def test_processes_share_out_an_evaluation(seed: int, n_batches: int, world: int) -> None:
    """Each window once, also where some processes have one window less, or none."""
    rng, model = np.random.default_rng(seed), fresh_model()
    windows = [torch.from_numpy(rng.integers(0, 60, (2, 6))) for _ in range(n_batches)]
    shared = [OneOf(rank, world) for rank in range(world)]
    for one in shared:
        validate.validation_loss(model, windows, parallel=one)
    loss, n_valid = sum(one.added for one in shared).tolist()
    assert n_valid == 10 * n_batches
    assert loss / n_valid == pytest.approx(validate.validation_loss(model, windows), rel=1e-12)


@given(n=st.integers(1, 60), vocab_size=st.integers(1, 40), n_bytes=st.integers(1, 4000))
def test_pieces_are_alike_and_their_logits_fit(n: int, vocab_size: int, n_bytes: int) -> None:
    """All positions in order; only the last piece is smaller, and only one row may not fit."""
    hidden, targets = torch.zeros(1, n, 2), torch.arange(n)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_torch.model.loss.CHUNK_BYTES", n_bytes)
        pieces = [piece for _, piece in _pieces(hidden, vocab_size, targets)]
    assert torch.equal(torch.cat(pieces), targets[0])
    sizes = [len(piece) for piece in pieces]
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0] <= max(1, n_bytes // (4 * vocab_size))


@given(seed=seeds, rows=st.integers(1, 4), length=st.integers(1, 9), piece=st.integers(1, 7))
def test_the_chunked_loss_is_the_plain_one(seed: int, rows: int, length: int, piece: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, targets, *_ = random_batch(rng, rows, length)
    targets[0, 0] = 1
    model = fresh_model()
    logits, _ = model(tokens)
    n_valid = count_valid(targets)
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
    plain.backward()
    expected = [p.grad for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_BYTES", 8 * piece * TINY.vocab_size)
        model = fresh_model()
        hidden, _ = model.model(tokens)
        loss = backward_loss(hidden, model.head_weight, targets, n_valid)
        total = loss_sum(hidden.detach(), model.head_weight.detach(), targets)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert total.item() == pytest.approx(plain.item() * n_valid, rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_step_without_valid_targets_is_refused() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.long)
    model = fresh_model()
    with pytest.raises(InputError, match="valid target"):
        step.train_step(
            model,
            make_adamw(model, OptimConfig()),
            [batch.Batch(tokens, torch.full_like(tokens, IGNORE))],
            lr=1.0,
            grad_clip=1.0,
        )


def test_only_matrices_decay() -> None:
    decayed, kept = make_adamw(fresh_model(), OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}


def test_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 1, config) > 0  # a run of one step still moves


def test_initial_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (list(fresh_model(seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_run_leaves_a_model_directory(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"python tools/compare.py {out}/model.safetensors" in printed
    assert f"python -m llama_torch.generate --ckpt {out}" in printed
    assert "sample: 'The" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("run.json", "lock", "tensorboard", "checkpoints", "best"),
    }
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "6"}
    logged = scalars(out)
    assert logged.keys() == {
        *("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"),
        *("train/mfu", "train/peak_memory_gib"),
        *("val/loss", "val/perplexity"),
    }
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged["val/loss"]] == [0, 3, 6]
    assert logged["val/loss"][0][1] == pytest.approx(math.log(50257), abs=0.1)
    assert logged["val/loss"][-1][1] < logged["val/loss"][0][1]
    hf = json.loads((out / "config.json").read_text())
    assert (hf["model_type"], hf["eos_token_id"]) == ("llama", 50256)
    load_model(out)
    load_model(out / "model.safetensors")
    load_model(out / "best")


def state_file(out: Path) -> Path:
    """Return the newest checkpoint's file, which may not exist."""
    return (step_folders.newest(out) or out / "none") / STATE_FILE


@pytest.mark.parametrize(
    ("stop_at", "more"),
    [
        (0, ["--sample-prompt=-x"]),
        (1, []),
        (3, ["--grad-accum", "2", "--max-seq-len", "60"]),  # crosses an epoch's end
        (5, ["--dtype", "bfloat16"]),
        (3, ["--num-workers", "1"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, text: str, stop_at: int, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = [*SMALL_RUN, *more, "--data", text]
    assert train.main([*flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert train.main([*flags, "--out", str(parted)]) == 130
    assert state_file(parted).exists() == (stop_at >= 2)
    assert train.main(["--resume", "--out", str(parted)]) == 0
    for name in (f"checkpoints/6/{STATE_FILE}", "model.safetensors", "best/model.safetensors"):
        one, other = load_file(whole / name), load_file(parted / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = scalars(whole), scalars(parted)
    for tag in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert dict(first[tag]) == dict(second[tag])


def test_a_run_begun_before_a_setting_existed_resumes(tmp_path: Path, text: str) -> None:
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    for part in ("identity", "settings"):
        del record[part]["model"]["rope_type"], record[part]["model"]["rope_factor"]
    (out / "run.json").write_text(json.dumps(record))
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert train.main(["--resume", "--out", str(out), "--rope-factor", "2"]) == 2


def test_an_export_torn_from_its_state_is_written_again(tmp_path: Path, text: str) -> None:
    """Killed between the two files of a checkpoint: the state decides."""
    out = tmp_path / "run"
    assert train.main([*SMALL_RUN, "--data", text, "--out", str(out)]) == 0
    expected = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.999999999.tmp").write_bytes(b"half")  # no such process
    assert train.main(["--resume", "--out", str(out)]) == 0
    again = load_file(out / "model.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert not list(out.glob("*.tmp"))


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path, text: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    flags = [*SMALL_RUN, "--data", text, "--batch-size"]
    assert train.main([*flags, "4", "--out", str(one)]) == 0
    assert train.main([*flags, "2", "--grad-accum", "2", "--out", str(other)]) == 0
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-6)


@pytest.fixture
def finished(tmp_path: Path, text: str) -> Iterator[tuple[Path, list[str]]]:
    out = tmp_path / "run"
    flags = [*SMALL_RUN, "--data", text, "--out", str(out)]
    assert train.main(flags) == 0
    return out, flags


def test_a_directory_in_use_is_refused(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = finished
    before = state_file(out).read_bytes()
    assert "already holds a run" in refused(flags, capsys)
    assert "--lr is 0.0003 there and 0.1 here" in refused(
        ["--resume", "--out", str(out), "--lr", "0.1"], capsys
    )
    assert "--n-layers is 1 there and 2 here" in refused(
        ["--resume", "--out", str(out), "--n-layers", "2"], capsys
    )
    Path(flags[flags.index("--data") + 1]).write_text("Another text entirely. " * 100)
    assert "text of --data has changed" in refused(["--resume", "--out", str(out)], capsys)
    assert state_file(out).read_bytes() == before
    shutil.rmtree(out / "checkpoints")
    Path(flags[flags.index("--data") + 1]).write_text(TEXT)
    assert "no checkpoint in checkpoints/" in refused(["--resume", "--out", str(out)], capsys)


def test_a_foreign_directory_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL_RUN, "--data", text, "--out"]
    (tmp_path / "config.json").write_text("{}")
    assert "already holds a config.json" in refused([*flags, str(tmp_path)], capsys)
    assert "cannot be written" in refused([*flags, str(Path(text) / "below")], capsys)
    assert "holds no run" in refused(["--resume", "--out", str(tmp_path)], capsys)
    (tmp_path / "run.json").write_text("{}")
    assert "run.json: is not this package's" in refused(
        ["--resume", "--out", str(tmp_path)], capsys
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("mine")
    assert "holds a tokenizer.json" in refused([*flags, str(tmp_path / "other")], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--lr", "fast"], "--lr"),
        (["--stepz", "3"], "--stepz"),
        (["--device", "tpu"], "'tpu'"),
        (["--dim", "250"], "--dim must be a multiple of --n-heads 8"),
        (["--max-seq-len", "100000"], "--max-seq-len 100000 needs 100001 tokens"),
        (["--vocab-size", "100"], "--vocab-size 100 is too small"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no file found"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: cannot be read"),
        (["--resume"], "--resume: no run in runs/"),
        (["--seed", "100000000000000"], "--seed must lie between"),
        (["--weight-decay", "inf"], "--weight-decay must be"),
        (["--data", ""], "--data '' names nothing"),
        (["--out", "o" * 300], "File name too long"),
    ],
)
def test_config_mistakes_fail_before_any_work(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(flags, capsys)
    assert list(tmp_path.iterdir()) == []


def test_toml_sets_defaults_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        "steps = 7\nseed = 5\n[model]\ntie_embeddings = false\nn_layers = 2\n"
        "[data]\ndata = ['a', 'b']\n"
    )
    config = run_dir.resolve_config(["--config", "run.toml", "--seed", "9"])
    assert (config.steps, config.seed, config.model.n_layers) == (7, 9, 2)
    assert config.model.tie_embeddings is False
    assert config.data.data == ("a", "b")
    assert config.out == "runs/1"
    (tmp_path / "run.toml").write_text("[model]\ndim = 10\n")  # valid with the flags only
    config = run_dir.resolve_config(["--config", "run.toml", "--n-heads", "5", "--n-kv-heads", "5"])
    assert (config.model.dim, config.model.head_dim) == (10, 2)
    for text in ("resume = true\n", "config = 'other.toml'\n"):
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(InputError, match="belongs on the command line"):
            run_dir.resolve_config(["--config", "run.toml"])
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        run_dir.resolve_config(["--config", "run.toml"])
    (tmp_path / "run.toml").write_text("[model]\nlayers = 2\n")
    with pytest.raises(InputError, match="--config run.toml: unknown setting layers"):
        run_dir.resolve_config(["--config", "run.toml"])


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2", "10", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_dir.resolve_config([]).out == "runs/11"


@pytest.mark.parametrize(
    ("lr", "message"),
    [("1e39", "is not finite after step 1"), ("1e30", "step 2 is bad: its loss is")],
)
def test_a_run_that_explodes_stops(
    lr: str, message: str, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [*SMALL_RUN, "--data", text, "--out", str(out), "--lr", lr, "--grad-clip", "1e9"]
    assert train.main([*flags, "--save-every", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "lower --lr" in error
    saved = out / "model.safetensors"
    assert not saved.exists() or all(t.isfinite().all() for t in load_file(saved).values())


def test_a_loss_beyond_all_bounds_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "train", lambda config: 800.0)
    assert train.main(["--out", str(tmp_path / "run")]) == 0
    assert "validation loss 800.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--data", "no\nfile"], ["--resume=x"], ["--resume", "--out=a\nb"]]
)
def test_whatever_a_flag_holds_the_error_is_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(flags, capsys)


@pytest.mark.parametrize("command", [generate, compare])
def test_a_name_of_two_lines_is_an_error_of_one(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--ckpt", "no\nfile", "--prompt", "a"] if command is generate else ["no\nfile"]
    assert command.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1
