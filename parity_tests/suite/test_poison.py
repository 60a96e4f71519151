"""--poison fills uninitialised memory, and products that read gaps between rows are refused."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llama_torch.model import loss

from ..plugins import poison
from ..plugins.environment import POISONED

pytestmark = pytest.mark.numeric


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(POISONED, os.environ.get(POISONED, ""))
    poison.install(monkeypatch.setattr)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 4),
        lambda: torch.empty((3, 4), dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.zeros(3)),
        lambda: torch.empty_strided((2, 2), (4, 1)),
        lambda: torch.zeros(3).new_empty(2, 2),
        lambda: torch.nn.Parameter(torch.empty(3, requires_grad=True)),
        lambda: torch.zeros(0).resize_(3),
        lambda: torch.Tensor(3),
        lambda: torch.zeros(1).new(3),
        lambda: np.empty((3, 4)),
        lambda: np.empty_like(np.zeros(3, np.float32)),
    ],
)
def test_memory_without_content_is_nan(allocate: Callable[[], Any]) -> None:
    found = allocate()
    assert (found != found).all()


@pytest.mark.usefixtures("_poisoned")
def test_integers_without_content_are_large() -> None:
    assert torch.empty(2, dtype=torch.int64).tolist() == [2**63 - 1] * 2
    assert np.empty(2, np.int32).tolist() == [2**31 - 1] * 2


@pytest.mark.usefixtures("_poisoned")
def test_a_device_context_is_left_alone() -> None:
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "meta"


def wide(content: float) -> torch.Tensor:
    """Return a 3 x 5 view of rows eight elements apart, with ``content`` in the gaps."""
    memory = torch.full((3, 8), content)
    memory[:, :5] = 1.0
    return memory[:, :5]


@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.T, lambda x: x[None]])
def test_gaps_between_rows_are_looked_at(turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert poison.gaps_are_finite(turn(wide(7.0)))
    assert not poison.gaps_are_finite(turn(wide(torch.nan)))
    assert not poison.gaps_are_finite(turn(wide(torch.inf)))


def test_a_product_that_could_read_a_gap_is_refused() -> None:
    weight = torch.ones(5, 2)
    with poison.WatchedProducts():
        assert (wide(7.0) @ weight).eq(5).all()
        assert (
            torch.nn.functional.linear(torch.full((2, 3), torch.nan), torch.ones(2, 3))
            .isnan()
            .all()
        )
        for product in (
            lambda x: x @ weight,
            lambda x: torch.nn.functional.linear(x, weight.T),
            lambda x: torch.einsum("nv,vd->nd", x, weight),
            lambda x: torch.addmm(torch.zeros(3, 2), x, weight),
        ):
            with pytest.raises(AssertionError, match="never written between the rows"):
                product(wide(torch.nan))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_bytes", [1 << 26, 1 << 12])
def test_the_loss_reads_nothing_beyond_the_vocabulary(
    dtype: torch.dtype, n_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """27 rows of 274 logits: of such shapes oneDNN's product on AMX reads the columns between."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", n_bytes)
    loss._cached_buffer.cache_clear()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 27, 95, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(274, 95, generator=generator).to(dtype).requires_grad_()
    with poison.WatchedProducts():
        found = loss.backward_loss(hidden * 1, head, torch.arange(27)[None], 27)
    assert found.isfinite()
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad.isfinite().all()
    assert head.grad.isfinite().all()
    loss._cached_buffer.cache_clear()
