"""What is refused beside --init-from: flags that contradict, and directories that are no model."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..support.model_directories import flags_of
from ..support.trainer_runs import refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dim", "24"], "--dim 24 contradicts {}/config.json (hidden_size=12)"),
        (["--dim", "512"], "got 512; see --help; the model is that of {}/config.json: leave its"),
        (["--tie-embeddings"], "--tie-embeddings True contradicts {}/config.json"),
        (["--rope-type", "default"], "--rope-type default contradicts {}/config.json"),
        (["--vocab-size", "50257"], "(vocab_size=700); leave it out"),
        (["--max-seq-len", "41"], "--max-seq-len 41 is more than {}/config.json allows"),
        (["--n-kv-heads=2"], "a multiple of --n-kv-heads 2, got 3; see --help; the model is that"),
    ],
)
def test_a_flag_that_contradicts_is_refused(
    more: list[str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = models["spaced"]
    flags = [*flags_of(model, "spaced", tmp_path)[0], "--out", str(tmp_path / "run")]
    assert message.format(model) in refused([*flags, *more], capsys)
    words = more[0].lstrip("-").split("=") + more[1:]
    name, value = words[0].replace("-", "_"), words[-1]
    toml = tmp_path / "run.toml"
    quoted = {"tie_embeddings": "true", "rope_type": '"default"'}.get(name, value)
    toml.write_text(f"{name} = {quoted}\n")
    index = flags.index("--max-seq-len")
    said = refused([*flags[:index], *flags[index + 2 :], "--config", str(toml)], capsys)
    assert f"{toml}: {name}" in said or "; the model is that of" in said
    assert not (tmp_path / "run").exists()


def break_shape(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, {"format": "pt"})


def break_value(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "--init-from {}: holds no config.json"),
        (lambda model: (model / "config.json").unlink(), "--init-from {}: holds no config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda model: (model / "tokenizer.model").unlink(), "{}: holds no tokenizer.json"),
        (break_shape, "model.norm.weight is [3] and should be [16]"),
        (break_value, "model.safetensors: model.norm.weight is not finite"),
    ],
)
def test_a_directory_that_is_no_beginning_is_refused(
    damage: Any,
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models["pieces"], model)
    flags, _ = flags_of(model, "pieces", tmp_path)
    damage(model)
    said = refused([*flags, "--out", str(tmp_path / "run")], capsys)
    assert message.format(model) in said
    assert not (tmp_path / "run").exists()
