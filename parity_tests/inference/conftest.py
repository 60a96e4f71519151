"""A small model directory, for the tests of commands and of the Python interface."""

from pathlib import Path

import pytest

from ..backends.torch_model import small_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))
