"""Ports with limits: compared in full number, green when honest and red with a planted bug."""

import re
import subprocess

import pytest

from reference_np import backend
from reference_np.config import InputError
from reference_np.refusals import is_own_refusal

from ..support.suite_runs import suite
from . import toy_ports

NUMPY, TORCH = "parity_tests.suite.toy_ports:", "parity_tests.suite.toy_torch_port:"
ORACLES, LONG = "parity_tests.suite.toy_oracles:", "parity_tests.suite.toy_long:"
HONEST = [
    *(NUMPY + name for name in ("Small", "Engine", "Float32Epsilon", "Float32Angles")),
    NUMPY + "OneTokenEach",
    *(TORCH + name for name in ("InPlace", "AsValue")),
]
# A port with a bug, and a test that fails on it.
BUGS = {
    NUMPY + "SmallWithFixedEpsilon": "causal_logits",
    NUMPY + "SmallWithFixedEpsilonInFloat32": "causal_logits",
    NUMPY + "SmallWithTiledHeads": "causal_logits",
    ORACLES + "QueriesTransposedWhereSquare": "causal_logits",
    ORACLES + "MeanOfMeansInFloat32": "loss_and_grads",
    ORACLES + "PaddingLearntInFloat32": "loss_and_grads",
    ORACLES + "ZLossForgottenInFloat32": "loss_and_grads",
    NUMPY + "EngineOfOldPrompts": "engine",
    NUMPY + "EngineOneLate": "engine",
    LONG + "Window": "long_logits",
    LONG + "Bfloat16Positions": "long_logits",
    LONG + "EngineOf128Keys": "long_engine",
    NUMPY + "Float32EpsilonUndeclared": "causal_logits",
    NUMPY + "Float32AnglesUndeclared": "logits",
    NUMPY + "Float32AnglesWithBfloat16Frequencies": "causal_logits",
    NUMPY + "Float32AnglesWithPositionsOneLate": "causal_logits",
    TORCH + "InPlaceSaidToBeAValue": "reused_cache",
    TORCH + "CacheOverwritten": "chunked_decoding",
    TORCH + "PaddingSeen": "padding",
    "parity_tests.planted:bug.mask_next_seen": "causal_logits",
    "parity_tests.planted:bug.mask_itself_hidden": "causal_logits",
}


def options(*names: str) -> list[str]:
    return [f"--backend={name}" for name in names]


FOLDER = "parity_tests/conformance"
TESTS = [
    f"{FOLDER}/test_{'long_sequences' if 'long' in test else 'conformance'}.py::test_{test}[{name}]"
    for name, test in BUGS.items()
]
ALL_HONEST = suite(FOLDER, *options(*HONEST))
ALL_WITH_BUGS = suite(*TESTS, *options(*BUGS), "--hypothesis-profile", "unshrunk")
SHRUNK = suite(
    f"{FOLDER}/test_conformance.py::test_causal_logits[{NUMPY}SmallWithFixedEpsilonInFloat32]",
    f"--backend={NUMPY}SmallWithFixedEpsilonInFloat32",
)
NEARLY_EMPTY = suite(FOLDER, *options(NUMPY + "RefusesEverything"))
OF_A_LIBRARY = suite(FOLDER, *options(NUMPY + "Refusing"), "-k", "causal_logits")


def table(done: subprocess.CompletedProcess[str], name: str) -> str:
    """Return the lines of the last table about one backend."""
    lines = done.stdout.split(f"  {name}: ")[1].splitlines()
    end = next((i for i, line in enumerate(lines) if i and not line.startswith("    ")), None)
    return "\n".join(lines[:end])


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_port_is_green_on_a_full_number_of_examples(name: str) -> None:
    done = ALL_HONEST.done()
    assert done.returncode == 0, done.stdout
    compared = re.match(r"(\d+) compared, (\d+) not covered", table(done, name))
    assert compared is not None
    assert int(compared[1]) >= 40
    assert "examples: head_dim" not in table(done, name)


def test_the_table_of_limits_names_the_tests_outside() -> None:
    found = table(ALL_HONEST.done(), TORCH + "InPlace")
    assert "not covered, by limit:" in found
    assert re.search(r"masks = left padding +packing\n", found)
    assert re.search(r"cache = in place +reused_cache\n", found)
    assert re.search(r"positions = shifted\n", found)


def test_float32_angles_are_a_documented_difference() -> None:
    done = ALL_HONEST.done()
    assert "outputs: rotary angles multiplied in float32" in table(done, NUMPY + "Float32Angles")
    assert "documented difference" not in table(done, NUMPY + "Small")


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_red(name: str) -> None:
    done = ALL_WITH_BUGS.done()
    assert done.returncode == 1
    assert re.search(rf"FAILED .*::test_{BUGS[name]}\[{re.escape(name)}\]", done.stdout)


def test_an_epsilon_that_is_not_read_is_named() -> None:
    assert "norm_eps is 1e-05 whatever the config says" in ALL_WITH_BUGS.done().stdout


def test_an_epsilon_is_named_in_float32_where_the_smallest_example_cannot_tell_it() -> None:
    output = SHRUNK.done().stdout
    assert "equals     the known bug norm_eps_1e-05: norm_eps is 1e-05 whatever the " in output
    assert "norm_eps_1e-06" not in output


def test_a_mask_that_is_off_by_one_is_named() -> None:
    output = ALL_WITH_BUGS.done().stdout
    for words in ("each token attends to the next one too", "no token attends to itself"):
        assert f"the causal mask is off by one: {words}" in output


def test_a_nearly_empty_run_is_red_and_says_why() -> None:
    done = NEARLY_EMPTY.done()
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("FAILED " + NUMPY))
    assert re.search(r"\d+ of \d+ examples compared, the least is \d+", line)
    assert "head_dim is dim / n_heads here" in line
    assert "limits" in line


def test_a_refusal_from_inside_a_library_is_a_failure() -> None:
    done = OF_A_LIBRARY.done()
    assert done.returncode == 1
    assert "NotImplementedError from " in done.stdout
    assert "asyncio" in done.stdout


def test_a_refusal_is_the_backends_own_where_its_file_raises_it() -> None:
    for port, own in ((toy_ports.RefusesEverything(), True), (toy_ports.Refusing(), False)):
        with pytest.raises(NotImplementedError) as caught:
            port.logits(Config, None, None, None, None)
        assert is_own_refusal(port, caught.value) is own


class Config:
    """The fields of a config that RefusesEverything reads."""

    head_dim, n_heads, dim, rope_type = 4, 2, 9, "default"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithoutEngine", "limits.cache is 'engine', without a method append or start"),
        ("WithWrongLimits", "limits must be a reference_np.limits.Limits, not str"),
        ("WithAnglesInAnotherPrecision", "limits.float32_angles has bfloat16, not among"),
    ],
)
def test_a_backend_that_contradicts_its_limits_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        backend.load(NUMPY + name)
