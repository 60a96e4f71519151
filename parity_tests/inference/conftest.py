"""A small model directory, for the tests of commands and of the Python interface."""

from pathlib import Path

import pytest

from llama_torch.model.config import ModelConfig

from ..backends.torch_model import write_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=24)
    write_model(folder, config)
    return folder
