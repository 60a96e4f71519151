"""Ports that ignore an argument: the failure's report names which."""

import numpy as np
import pytest

from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.ops import Array

from ..conformance.bounds import resembling
from ..conformance.ignored import IGNORED
from ..conformance.oracle import Oracle
from ..conformance.strategies import random_params
from ..support.suite_runs import suite

PORTS = "parity_tests.suite.test_ignored:"


class MaskIgnored(Oracle):
    """The oracle that takes a mask and reads none of it."""

    def decode(self, config, params, tokens, positions, mask, cache):
        return super().decode(config, params, tokens, positions, None, cache)


class PositionsIgnored(Oracle):
    """The oracle that takes positions and reads none of them."""

    def decode(self, config, params, tokens, positions, mask, cache):
        return super().decode(config, params, tokens, None, mask, cache)


NAMED = {
    ("MaskIgnored", "logits"): "the known bug mask_ignored: the mask that is given is ignored",
    ("MaskIgnored", "packing"): "the known bug mask_ignored: ",
    ("MaskIgnored", "padded_decoding"): "the known bug mask_ignored: ",
    ("PositionsIgnored", "logits"): "the known bug positions_ignored: the positions that are given",
}
RED = suite(
    "parity_tests/conformance",
    *("-k", " or ".join(f"{port} and test_{test}[" for port, test in NAMED)),
    *(f"--backend={PORTS}{port}" for port in ("MaskIgnored", "PositionsIgnored")),
)


@pytest.mark.parametrize(("port", "test"), NAMED)
def test_an_ignored_argument_is_named(port: str, test: str) -> None:
    output = RED.done().stdout
    report = output.split(f" test_{test}[{PORTS}{port}] ")[1].partition("\n_")[0]
    assert NAMED[port, test] in report


CONFIG = LlamaConfig(16, 2, 4, 2, 4, 20, 30)
PARAMS = random_params(CONFIG, 0)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 6))
POSITIONS = np.random.default_rng(1).integers(0, 60, (2, 6))
MASK = np.random.default_rng(2).random((2, 6, 6)) < 0.5
MASK |= np.eye(6, dtype=bool)
BATCH = Batch(TOKENS, TOKENS[::-1], POSITIONS, MASK)


@pytest.mark.parametrize("method", ["logits", "trace", "loss_and_grads"])
@pytest.mark.parametrize("name", IGNORED)
def test_each_is_told_from_the_others(name: str, method: str) -> None:
    def run(model: Oracle) -> dict[str, Array]:
        if method == "loss_and_grads":
            grads = model.loss_and_grads(CONFIG, PARAMS, [BATCH], 0.0)[1]
            return {"output": grads["model.norm.weight"]}
        found = getattr(model, method)(CONFIG, PARAMS, TOKENS, POSITIONS, MASK)
        return {"output": found["logits"] if method == "trace" else found}

    actual, exact = run(IGNORED[name][1])["output"], run(Oracle())["output"]
    named = resembling(run, "output", actual, exact, "float64")
    # Without a cache the columns are the positions that count from it.
    same = {"left_padding_in_positions"} if name == "positions_ignored" else set()
    assert {one.partition(":")[0] for one in named} - same == {name}
