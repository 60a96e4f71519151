"""A config.json's sizes are compared with the file's header before anything is made of them."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.numpy import load_file

from llama_parity import random_checkpoint
from llama_parity.conversion.hf_checkpoint import read_hf
from llama_torch.checkpoint.hf import load_model
from llama_torch.model.llama import Llama
from llama_torch.model.shapes import ParameterShapes, parameter_count
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.naming import parameter_shape, parameter_shapes

from ..backends.torch_model import save_numpy, torch_config
from ..conformance.strategies import configs
from ..support.checkpoints import CONFIG, ERRORS, write_model_file

MOST_LINES = 100_000  # of Python that a reader runs; 20,000 layers have 180,000 parameters
READERS = pytest.mark.parametrize("read", [Checkpoint, load_model, read_hf])


def claiming(folder: Path, **claims: Any) -> Path:
    """Write a small checkpoint whose config.json claims other sizes."""
    path = folder / "model.safetensors"
    save_numpy(load_file(write_model_file(path)), path)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | claims))
    return path


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """Return a reader's error; assert that it runs no more lines than a small file asks for."""
    n_lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal n_lines
        n_lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        with pytest.raises(ERRORS) as caught:
            read(path)
    finally:
        sys.settrace(before)
    assert n_lines < MOST_LINES
    return str(caught.value)


@READERS
@pytest.mark.parametrize("n_layers", [20_000, 2**31 - 1])
def test_layers_that_the_file_lacks_are_counted_and_not_built(
    tmp_path: Path, read: Callable[[Path], object], n_layers: int
) -> None:
    message = refusal(read, claiming(tmp_path, num_hidden_layers=n_layers))
    assert f"{9 * (n_layers - 2) - 3:,} more are missing" in message
    assert message.count("is missing") == 3
    assert "model.layers.2.input_layernorm.weight is missing" in message
    assert len(message) < 600


@READERS
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 2**31 - 2),
        ("intermediate_size", 2**31 - 1),
        ("head_dim", 2**31 - 2),
        ("num_attention_heads", 2**31 - 2),
        ("vocab_size", 2**31 - 1),
    ],
)
def test_widths_that_the_file_contradicts_are_not_allocated(
    tmp_path: Path, read: Callable[[Path], object], key: str, value: int
) -> None:
    message = refusal(read, claiming(tmp_path, **{key: value}))
    assert "and should be [" in message
    assert len(message) < 900


@READERS
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [2**31, 2**63, 10**400])
def test_no_size_is_2_31_or_more(
    tmp_path: Path, read: Callable[[Path], object], key: str, value: int
) -> None:
    message = refusal(read, claiming(tmp_path, **{key: value}))
    assert f"config.json: {key} must be a positive integer below 2^31, got " in message


@READERS
def test_of_many_wrong_tensors_the_first_are_named_and_the_rest_counted(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    extra: dict[str, Any] = {f"extra.{i}": np.zeros(1, np.float32) for i in range(1000)}
    wide = {f"model.layers.{i}.mlp.{n}_proj.weight": np.zeros((1, 1), np.float32)
            for i in range(2) for n in ("gate", "up", "down")}  # fmt: skip
    message = refusal(read, write_model_file(tmp_path / "m.safetensors", **extra, **wide))
    assert message.count("is not a parameter of it") == 3
    assert "997 more are" in message
    assert message.count("and should be") == 3
    assert "3 more are of another shape" in message


def odd_names(config: LlamaConfig) -> Sequence[str]:
    last = config.n_layers - 1
    return [
        *("", "model", "model.layers", "model.layers.", "model.layers.0", "model.layers.0."),
        *(f"model.layers.{last + 1}.mlp.up_proj.weight", "model.layers.-1.mlp.up_proj.weight"),
        *("model.layers.00.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"),
        *(
            f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
            "model.layers.\u00b2.mlp.up_proj.weight",
        ),
        *("model.layers.0.mlp.up_proj.weight\n", "model.layers.\u0660.mlp.up_proj.weight"),
    ]


@given(config=configs())
def test_shapes_by_arithmetic_are_those_of_the_model(config: LlamaConfig) -> None:
    made = torch_config(config)
    with torch.device("meta"):
        model = Llama(made)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    shapes = ParameterShapes(made)
    assert list(shapes) == list(expected)
    assert (dict(shapes), len(shapes)) == (expected, len(expected))
    assert parameter_count(made) == sum(p.numel() for p in model.parameters())
    assert {name: parameter_shape(config, name) for name in expected} == parameter_shapes(config)
    for name in odd_names(config):
        assert name not in shapes
        assert parameter_shape(config, name) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-layers 1000000000", "--shape 7b with 1000000000 layers takes 376,968,384.3 GiB, and"),
        ("--n-layers 2147483648", "--n-layers must be below 2^31"),
        ("--n-layers -1", "--n-layers must not be negative"),
        ("--seed 18446744073709551616", "--seed must lie between 0 and 2^63 - 1"),
    ],
)
def test_a_random_checkpoint_that_no_disk_holds_is_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert random_checkpoint.main([str(tmp_path / "new" / "model"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []
