"""Settings of a TOML file and of run.json are values: none is a flag, a wrong one is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.cli import parse
from llama_common.settings import check_settings
from llama_torch import export, train
from llama_torch.config import TrainConfig
from llama_torch.training import run_dir

from ..support import state_files
from ..support.trainer_runs import refused


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    return out


def change(out: Path, *keys: str, to: Any) -> None:
    """Set a value of run.json, by its keys."""
    path = out / "run.json"
    record = state_files.read(path)
    table = record
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = to
    state_files.write(path, record)


# Values are no flags

WORDS = ["--out=other", "--steps", "7", "--resume", "-x", "--", "t.txt", "", "--no-keep-best"]


def test_words_of_a_run_file_set_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in WORDS:
        Path(word or "empty").write_text("text")
    change(run, "settings", "data", "data", to=[w for w in WORDS if w])
    change(run, "settings", "sample_prompt", to="--steps=9")
    change(run, "settings", "out", to="--resume")
    change(run, "settings", "config", to="other.toml")
    change(run, "settings", "resume", to=False)
    before = json.loads((run / "run.json").read_text())["settings"]["steps"]
    config = run_dir.resolve_config(["--resume", "--out", str(run)])
    assert (config.out, config.steps, config.resume) == (str(run), before, True)
    assert config.data.data == tuple(w for w in WORDS if w)
    assert (config.sample_prompt, config.keep_best, config.config) == ("--steps=9", True, "")


def test_a_run_in_a_section_goes_nowhere_else(run: Path, tmp_path: Path) -> None:
    change(run, "settings", "model", "out", to=str(tmp_path / "other"))
    with pytest.raises(run_dir.InputError, match=r"run\.json: out stands there twice"):
        run_dir.resolve_config(["--resume", "--out", str(run)])
    record = state_files.read(run / "run.json")
    del record["settings"]["out"]
    state_files.write(run / "run.json", record)
    assert run_dir.resolve_config(["--resume", "--out", str(run)]).out == str(run)


def test_words_of_a_toml_file_set_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(
        f"sample_prompt = '--seed=3'\n[data]\ndata = {json.dumps(WORDS)}\n[x]\nlr = 1\n"
    )
    config = run_dir.resolve_config(["--config", "a.toml"])
    assert (config.out, config.steps, config.seed) == ("runs/1", TrainConfig().steps, 0)
    assert (config.data.data, config.sample_prompt) == (tuple(WORDS), "--seed=3")
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    Path("a.toml").write_text("[data]\ndata = 'one.txt'\n[other]\nout = 'there'\n")
    config = run_dir.resolve_config(["--config", "a.toml"])
    assert (config.data.data, config.out) == (("one.txt",), "there")
    assert run_dir.resolve_config(["--config", "a.toml", "--out", ""]).out == "runs/1"


@given(
    data=st.lists(st.text().filter(lambda t: "\0" not in t and t.isprintable()), max_size=3),
    lr=st.floats(1e-9, 1, exclude_min=True),
    steps=st.integers(1, 10**6),
    keep=st.booleans(),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
)
def test_any_value_arrives_as_it_is(
    data: list[str], lr: float, steps: int, keep: bool, device: str
) -> None:
    table = {
        "steps": steps,
        "keep_best": keep,
        "device": device,
        **{"data": {"data": data}, "optim": {"lr": lr}},
    }
    settings = check_settings(json.loads(json.dumps(table)), TrainConfig, "x")
    config = parse(TrainConfig, ["--seed", "5"], settings)
    assert (config.data.data, config.optim.lr, config.steps) == (tuple(data), lr, steps)
    assert (config.keep_best, config.device, config.seed) == (keep, device, 5)
    assert parse(TrainConfig, ["--steps", "3"], settings).steps == 3


# What is wrong is named by its file and key

WRONG: list[tuple[str, Any, str]] = [
    ("steps", {"a": 1}, "steps must be a whole number, got {'a': 1}"),
    ("steps", {}, "steps must be a whole number, got {}"),
    ("steps", "7", "steps must be a whole number, got '7'"),
    ("steps", 7.0, "steps must be a whole number, got 7.0"),
    ("steps", True, "steps must be a whole number, got True"),
    ("steps", -1, "steps must be positive, got -1"),
    ("lr", "fast", "lr must be a number, got 'fast'"),
    ("lr", 10**400, "lr must be a number, got 1000"),
    ("lr", -1.0, "lr must be positive, got -1.0"),
    ("keep_best", "no", "keep_best must be true or false, got 'no'"),
    ("device", "tpu", "device must be one of auto, cpu, cuda, got 'tpu'"),
    ("device", ["cpu"], "device must be one of auto, cpu, cuda, got ['cpu']"),
    ("data", ["a", 5], "data must be a text, got 5"),
    ("data", ["a\0b"], "data must be valid text"),
    ("data", [["a"]], "data must be a text, got ['a']"),
    ("sample_prompt", 3, "sample_prompt must be a text, got 3"),
    ("weights", ["x"], "weights must be a number, got 'x'"),
    ("stepz", 3, "unknown setting stepz"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_of_a_run_file(
    key: str,
    value: Any,
    message: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = {"lr": ["optim"], "data": ["data"], "weights": ["data"]}.get(key, [])
    change(run, "settings", *section, key, to=value)
    said = refused(["--resume", "--out", str(run)], capsys)
    assert f"error: {run}/run.json: {message}" in said


# Numbers of TOML end at 64 bits, and its texts hold no zero byte.
@pytest.mark.parametrize(
    ("key", "value", "message"), [w for w in WRONG if w[1] not in (10**400, ["a\0b"])]
)
def test_a_wrong_value_of_a_toml_file(
    key: str,
    value: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps(value) if not isinstance(value, dict) else "{a = 1}" if value else "{}"
    Path("a.toml").write_text(f"{key} = {text}\n")
    assert f"error: --config a.toml: {message}" in refused(["--config", "a.toml"], capsys)


def test_a_flag_is_named_where_a_flag_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("lr = 1e-3\nsteps = 0\n")
    said = refused(["--config", "a.toml", "--lr", "-1"], capsys)
    assert "--lr must be positive, got -1.0" in said or "a.toml: steps must be positive" in said
    said = refused(["--config", "a.toml", "--steps=-1"], capsys)
    assert said.startswith("error: --steps must be positive")


@pytest.mark.parametrize("section", ["", "[model]\n", "[anything]\n"])
@pytest.mark.parametrize("line", ["resume = true", "resume = false", "config = 'b.toml'"])
def test_what_belongs_on_the_command_line_is_refused_in_every_section(
    section: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(section + line)
    said = refused(["--config", "a.toml"], capsys)
    assert "--config a.toml:" in said
    assert "belongs on the command line" in said


def _identity(out: Path) -> None:
    change(out, "identity", "steps", to={"a": 1})


def _identity_section(out: Path) -> None:
    change(out, "identity", "model", to=[1])


def _section(out: Path) -> None:
    change(out, "settings", "model", to=5)


def _directory(out: Path) -> None:
    change(out, "directory", to=["/"])


def _deep(out: Path) -> None:
    (out / "run.json").write_text('{"settings":' * 100_000)


@pytest.mark.parametrize("damage", [_identity, _identity_section, _section, _directory, _deep])
def test_a_damaged_run_file_is_one_line(
    damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert str(run / "run.json") in refused(["--resume", "--out", str(run)], capsys)
    assert export.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert str(run / "run.json") in error
    assert error.count("\n") == 1


def test_a_model_that_cannot_be_is_named_by_its_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, "settings", "model", "n_kv_heads", to=3)
    said = refused(["--resume", "--out", str(run)], capsys)
    assert f"{run}/run.json: n_heads must be a multiple of --n-kv-heads 3" in said
    assert export.main([str(run)]) == 2
    assert (
        f"{run}/run.json: n_heads must be a multiple of --n-kv-heads 3" in capsys.readouterr().err
    )


def test_help_works_beside_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("lr = 1e-3\n")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--config", "a.toml", "--help"])
    assert not exit_.value.code
    assert "--n-layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("toml", "flags", "heads"),
    [
        ("", ["--dim", "128", "--n-heads", "2"], (2, 2)),
        ("n_heads = 2\n", ["--dim", "128"], (2, 2)),
        ("n_kv_heads = 1\n", ["--n-heads", "2"], (2, 1)),
        ("dim = 64\n", [], (8, 4)),
        ("", ["--n-heads", "8", "--n-kv-heads", "8"], (8, 8)),
    ],
)
def test_key_heads_that_nobody_gave_follow_the_heads(
    toml: str,
    flags: list[str],
    heads: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(toml)
    config = run_dir.resolve_config(["--config", "a.toml", *flags])
    assert (config.model.n_heads, config.model.n_kv_heads) == heads
