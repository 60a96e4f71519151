"""compare.py: an implementation by its file, and what is refused before anything is computed."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_parity.comparison.tensor_file import TensorFile
from llama_parity.conversion.file_kinds import is_gguf
from llama_torch.checkpoint import weight_files as of_torch
from reference_np import weight_files as of_oracle
from reference_np.tolerances import kl_per_token

QUICK = "--tokens", "4", "--steps", "0"
PORT = "from parity_tests.conformance.oracle import Oracle as Port\n"
WRONG = "class Port:\n    def logits(self, *arguments):\n        raise RuntimeError\n"


def test_an_implementation_is_given_by_its_file(
    ckpt: Path, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "inner").mkdir()
    (tmp_path / "of_compare.py").write_text(PORT)
    (tmp_path / "inner" / "of_compare.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path / "inner")
    code, out, err = run(ckpt, "--against", "../of_compare.py:Port", *QUICK)
    assert code == 0, err
    assert "oracle against ../of_compare.py:Port" in out
    code, out, err = run(ckpt, "--against", "of_compare.py:Port", *QUICK)
    assert (code, out) == (2, "")
    assert "an installed module has the name of_compare" in err
    (tmp_path / "inner" / "numpy.py").touch()
    err = run(ckpt, "--against", "of_compare:Port", *QUICK)[2]
    assert f"{tmp_path / 'inner' / 'numpy.py'}: hides the installed module numpy" in err


def test_a_page_needs_matplotlib_before_anything_is_computed(
    ckpt: Path, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(ckpt, "--against", "no.module:it", "--html", tmp_path / "x.html")
    assert (code, out) == (2, "")
    assert err == "error: --html needs matplotlib; pip install 'llama-parity[plot]'\n"


@pytest.mark.parametrize("flag", ["--ids", "--tokens"])
def test_a_flag_without_its_values_is_refused(ckpt: Path, run: Callable, flag: str) -> None:
    for argv in ([ckpt, flag], [ckpt, flag, "--steps", "0"]):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert err == f"error: {flag}: its value is missing; see --help\n"


def _opened(path: Path) -> None:
    with of_torch.open_safetensors(path, "np"):
        pass


@pytest.mark.parametrize(
    "read", [of_oracle.Header, of_oracle.require_weights, TensorFile, _opened, is_gguf]
)
def test_weights_that_cannot_be_read_are_not_called_absent(
    read: Callable, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)") as caught:
        read(ckpt)
    assert str(caught.value).startswith(f"{ckpt}: cannot be read")


def test_a_divergence_is_never_negative() -> None:
    """Logits that differ by a constant have the same probabilities, but for rounding."""
    rng = np.random.default_rng(0)
    exact = rng.normal(0, 3, (50, 20, 30))
    found = kl_per_token(exact + rng.normal(0, 1, (50, 20, 1)), exact)
    assert found.min() == 0
    assert found.max() < 1e-14
    assert np.isnan(kl_per_token(exact * np.nan, exact)).all()
