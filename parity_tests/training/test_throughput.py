"""The peak that MFU is relative to."""

import pytest
import torch

from llama_torch.training import throughput


@pytest.mark.parametrize(("computes", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_emulated_format_has_the_peak_of_float32(
    computes: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in bfloat16 itself, a machine that emulates it trained at an MFU of 396%."""
    multiplied: list[torch.dtype] = []

    class Recorded(torch.Tensor):
        def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
            multiplied.append(self.dtype)
            return torch.zeros(1, 1)

    monkeypatch.setattr(throughput, "computes_bfloat16", lambda device: computes)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.zeros(2, 2).as_subclass(Recorded))
    measure = getattr(throughput.peak_flops, "__wrapped__", throughput.peak_flops)
    measure(torch.device("cpu"), torch.bfloat16)
    assert set(multiplied) == {expected}
