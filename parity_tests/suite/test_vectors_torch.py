"""The PyTorch Llama passes every golden vector in every precision."""

from pathlib import Path

import pytest

from reference_np import backend

from ..vectors.check import check
from .vector_traces import CASES, backend_port, write_traces


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_torch_passes_every_case(dtype: str, tmp_path: Path) -> None:
    write_traces(tmp_path, backend_port(backend.load("torch"), dtype), dtype)
    verdicts = check(tmp_path)
    assert [verdict.line() for verdict in verdicts if verdict.status == "failed"] == []
    passed = sum(verdict.status == "passed" for verdict in verdicts)
    left_out = [case for case in CASES.values() if case.steps]
    if dtype != "bfloat16":  # a backend's step is always the first
        left_out = [case for case in left_out if len(case.steps) > 1]
    assert passed == len(CASES) - len(left_out)
