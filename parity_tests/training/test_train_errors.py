"""The trainer's errors, of one line each, and the reading of its flags."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from llama_common.errors import InputError
from llama_parity import compare
from llama_torch import generate, train
from llama_torch.training import loop, run_dir
from llama_torch.training.objective import TokenLoss

from ..support.trainer_runs import SMALL_RUN, TEXT, refused, state_file


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


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
        (["--device", "tpu"], "--device tpu: not one of auto, cpu, cuda"),
        (["--dim", "250"], "--dim must be a multiple of --n-heads 8"),
        (["--max-seq-len", "100000"], "--max-seq-len 100000 needs 100001 tokens"),
        (["--vocab-size", "100"], "--vocab-size 100 is too small"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no file found"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: cannot be read"),
        (["--config", "/dev/zero"], "--config /dev/zero: cannot be read (no regular file)"),
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
    monkeypatch.setattr(loop, "train", lambda *_: TokenLoss().measured([800.0, 1.0]))
    assert train.main(["--out", str(tmp_path / "run")]) == 0
    assert "validation loss 800.000, perplexity 10" in capsys.readouterr().out


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
