"""Threads, precision and caches are as plugins/process_state.py sets them."""

import os

import pytest
import torch

from llama_torch.training import throughput

from ..plugins import process_state
from ..plugins.cores import THREADS


def test_the_machine_is_measured_once() -> None:
    assert throughput.__name__ == process_state.MEASURING
    assert hasattr(throughput.peak_flops, "cache_info")


def test_torch_has_the_suites_threads() -> None:
    assert torch.get_num_threads() == THREADS
    assert os.environ["OPENBLAS_NUM_THREADS"] == str(THREADS)


def test_tokens_are_cached_in_the_runs_own_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert os.environ["XDG_CACHE_HOME"].startswith(str(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("attempt", [1, 2])
def test_precision_is_undone(attempt: int) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")


@pytest.fixture(scope="module")
def trained() -> None:
    """Set another precision, as training in a fixture of several tests does."""
    torch.set_float32_matmul_precision("high")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("attempt", [1, 2])
def test_precision_that_a_wider_fixture_sets_is_undone(attempt: int) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
