"""A backend's method that ends the process, or returns a list, fails by name."""

import sys
import unittest
from pathlib import Path

import numpy as np
import pytest

from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from ..conformance.calls import Calls, ParityError
from ..conformance.case_parts import rounded_and_exact_params
from ..conformance.strategies import Case

TEN = LlamaConfig(4, 1, 2, 2, 2, 4, 10)
TOKENS = np.zeros((2, 3), np.int64)


class Leaving:
    """A backend whose every method ends the process."""

    def __init__(self, code: int) -> None:
        self.code = code

    def loss_and_grads(self, *arguments):
        sys.exit(self.code)

    from_directory = append = effective_params = loss_and_grads


def test_a_method_that_ends_the_process_is_named(tmp_path: Path) -> None:
    calls, case = Calls(Leaving(0)), Case(TEN, {}, TOKENS, None, None)
    for method, call in (
        ("loss_and_grads", lambda: calls.loss_and_grads(TEN, {}, [Batch(TOKENS, TOKENS)], 0.0)),
        ("append", lambda: calls.append(TOKENS)),
        ("from_directory", lambda: calls.directory_logits(TEN, "", str(tmp_path), "", TOKENS)),
        ("effective_params", lambda: rounded_and_exact_params(Leaving(0), case, "float32")),
    ):
        with pytest.raises(ParityError, match=rf"{method} raised SystemExit\(0\), which ends the"):
            call()
    with pytest.raises(SystemExit):  # as llama-parity raises it on SIGTERM
        Calls(Leaving(143)).append(TOKENS)


@pytest.mark.parametrize("error", [unittest.SkipTest("later"), pytest.skip.Exception("later")])
def test_a_method_that_skips_the_check_is_named(error: BaseException) -> None:
    class Skipping:
        def append(self, tokens):
            raise error

    with pytest.raises(ParityError, match=r"append skips the check \(later\): raise NotImplem"):
        Calls(Skipping()).append(TOKENS)


def test_gradients_that_are_no_mapping_are_told() -> None:
    class Listed:
        def loss_and_grads(self, *arguments):
            return 1.0, []

    with pytest.raises(ParityError, match="the gradients must be a mapping from names .* got list"):
        Calls(Listed()).loss_and_grads(TEN, {}, [Batch(TOKENS, TOKENS)], 0.0)
