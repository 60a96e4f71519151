"""The suite's command line: nothing compared is not a pass, and errors are one line."""

import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from reference_np import backend
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.model import forward

from ..conformance.calls import Calls, ParityError
from ..conformance.judge import Judge
from ..conformance.oracle import Oracle
from ..plugins.expectations import known_checks
from ..support.jobs import Command, Job
from ..support.suite_runs import QUICK, suite

TEMPLATE = suite("parity_tests/", "--backend", "parity_tests.backends.template:YourLlama")


def test_the_template_fails_until_it_computes_something() -> None:
    done = TEMPLATE.done()
    assert done.returncode == 1
    assert "logits are required, and none were computed" in done.stdout
    assert "0 compared" in done.stdout
    assert "not covered: decode is not offered" in done.stdout


class Wrong(Oracle):
    """The oracle, with logits too large by a factor of 1 + 1e-6."""

    def logits(self, *arguments):
        return super().logits(*arguments) * (1 + 1e-6)


CHOSEN = "--backend", "parity_tests.suite.test_backends:Wrong", "-k", "test_logits and not in"
WRONG = suite("parity_tests/conformance/test_conformance.py", *CHOSEN)


def test_a_wrong_backend_fails_and_says_how_to_repeat_it() -> None:
    done = WRONG.done()
    assert done.returncode == 1
    assert "times its tolerance" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "--reproduce" in line)
    blob = line.split("--reproduce ")[1].split()[0]
    reproducing = suite(
        "parity_tests/conformance/test_conformance.py", *CHOSEN, "--reproduce", blob
    )
    report = done.stdout.split("FAILURES")[1].split("computed by")[0].splitlines()
    assert len(report) <= 12  # with two rules around ten lines
    assert any(line.startswith("config     head_dim=2 (dim / n_heads = ") for line in report)
    assert any(line.startswith("error      1e-06 of the largest value, tol") for line in report)
    lines = done.stdout.splitlines()
    assert "python -m llama_parity.random_checkpoint tiny-llama --shape tiny" in lines
    assert (
        f"python -m llama_parity.compare tiny-llama --against {CHOSEN[1]} --dtype float64" in lines
    )
    again = reproducing.done()
    assert again.returncode == 1
    assert "times its tolerance" in again.stdout


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere:object", "cannot be imported"),
        ("parity_tests.backends:nothing", "cannot be imported"),
        ("", "cannot be imported"),
        ("parity_tests.backends:DEFAULT", "has no method logits"),
        ("parity_tests.suite.test_backends:OddPrecision", "must be among"),
        ("parity_tests.suite.test_backends:NoTuple", "in a tuple, got 'float32'"),
    ],
)
def test_a_backend_that_cannot_be_had(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend.load(spec)


def test_former_names_of_a_backends_members_are_read() -> None:
    class Former(Oracle):
        share = 0.25

        def held(self, config, params):
            return {name: 2 * value for name, value in params.items()}

    former, one = Former(), {"norm": np.ones(1)}
    assert backend.example_fraction_of(former) == 0.25
    assert backend.effective_params_of(former, None, one) == {"norm": 2.0}
    assert backend.example_fraction_of(Oracle()) == 1.0
    assert backend.effective_params_of(backend.Backend(), None, one) == one


class OddFractions:
    """Backends with fractions of the examples that are none, by name."""

    below = type("Below", (Oracle,), {"example_fraction": -1})
    none = type("None", (Oracle,), {"example_fraction": 0.0})
    above = type("Above", (Oracle,), {"example_fraction": 1.5})
    nan = type("Nan", (Oracle,), {"example_fraction": float("nan")})
    text = type("Text", (Oracle,), {"example_fraction": "half"})
    former = type("Former", (Oracle,), {"share": None})


@pytest.mark.parametrize("name", ["below", "none", "above", "nan", "text", "former"])
def test_a_fraction_of_the_examples_is_above_zero_and_at_most_one(name: str) -> None:
    named = "share" if name == "former" else "example_fraction"
    with pytest.raises(InputError, match=f"{named} must be a number above 0 and at most 1"):
        backend.load(f"parity_tests.suite.test_backends:OddFractions.{name}")


class Tiny(Oracle):
    """A backend that asks for hardly any examples, and offers logits alone."""

    dtypes = ("float64",)
    example_fraction = 1e-4
    decode = trace = traced_decode = start = append = loss_and_grads = train = None
    from_directory = None

    def logits(self, config, params, tokens, positions, mask):
        return forward(params, tokens, config, positions=positions, mask=mask)[0]


TINY = suite("parity_tests/conformance", "--backend", "parity_tests.suite.test_backends:Tiny")


def test_a_small_fraction_leaves_the_least_number_of_examples() -> None:
    done = TINY.done()
    assert done.returncode == 0, done.stdout
    compared = re.search(r"Tiny: (\d+) compared", done.stdout)
    assert compared is not None
    assert int(compared[1]) >= 40


class OddPrecision(Oracle):
    """A backend with an unknown dtype."""

    dtypes = ("float8",)


class NoTuple(Oracle):
    """A backend with the name of one dtype for all."""

    dtypes = "float32"


def test_the_most_precise_dtype_is_judged_whatever_the_order() -> None:
    of = {"dtypes": ("float16", "bfloat16", "float32", "float64")}
    assert backend.dtypes_of(type("Odd", (), of)) == ("float64", "float32", "float16", "bfloat16")


def test_a_missing_output_fails() -> None:
    one = np.ones((1, 1, 1))
    with pytest.raises(AssertionError, match="missing: b"):
        Judge().compare(None, "float64", lambda model: {"a": one}, {"a": one, "b": one})


def test_not_a_number_fails() -> None:
    one = np.ones((1, 1, 1))
    with pytest.raises(AssertionError, match="a: 1 of 1 values are NaN, the first at"):
        Judge().compare(None, "float64", lambda model: {"a": one * np.nan}, {"a": one})


def test_what_a_process_recorded_arrives_whole() -> None:
    there, here = Judge(), Judge()
    there.begin("logits", "mine").not_covered["no masks"] += 2
    there.record("logits", 0.5, "float64")
    here.add(there.records())
    assert here.entries == there.entries


TEN = LlamaConfig(4, 1, 2, 1, 2, 6, 10)
TOKENS = np.zeros((2, 3), np.int64)


class Returns:
    """A backend whose logits are one given value."""

    def __init__(self, value) -> None:
        self.value = value

    def logits(self, *arguments):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 10)), r"logits has the shape \[2, 10\], not \[2, 3, 10\] \[B, T, V\]"),
        (np.full((2, 3, 10), np.nan), "logits: 60 of 60 values are NaN, the first at .0, 0, 0."),
        (np.full((2, 3, 10), np.inf), "logits: 60 of 60 values are infinite"),
        (np.zeros((2, 3, 10), int), "logits is of type ndarray and dtype int64: return floats"),
        (None, "logits is of type NoneType and dtype object: return floats"),
        ([[0.0], [0.0, 1.0]], "logits is no array"),
    ],
)
def test_a_result_that_cannot_be_compared_is_named(value, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        Calls(Returns(value)).logits(TEN, {}, TOKENS, None, None)


def test_a_torch_tensor_is_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ParityError, match="logits is a torch tensor: return a NumPy array"):
        Calls(Returns(torch.zeros(2, 3, 10))).logits(TEN, {}, TOKENS, None, None)


def test_bfloat16_of_ml_dtypes_is_a_float() -> None:
    logits = np.ones((2, 3, 10), ml_dtypes.bfloat16)
    found = Calls(Returns(logits)).logits(TEN, {}, TOKENS, None, None)
    assert found.dtype == np.float32
    assert (found == 1).all()


def test_a_missing_gradient_is_named() -> None:
    class Grads:
        def loss_and_grads(self, *arguments):
            return 1.0, {"a": np.zeros(2)}

    batch, params = Batch(TOKENS, TOKENS), {"a": np.zeros(2), "b": np.zeros(2)}
    with pytest.raises(ParityError, match="gradient of b is missing"):
        Calls(Grads()).loss_and_grads(TEN, params, [batch], 0.0)


def test_a_shipped_backend_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "parity_tests.backends.jax_backend", raising=False)
    with pytest.raises(InputError, match=r"pip install 'llama-parity\[jax\]' .* brings what"):
        backend.load.__wrapped__("jax")


# A port in the current folder, outside the repository, whose import and calls warn.
WARNING_PORT = """
import warnings
from parity_tests.conformance.oracle import Oracle
warnings.warn("old", DeprecationWarning)

class Mine(Oracle):
    def logits(self, *arguments):
        warnings.warn("older", UserWarning)
        return super().logits(*arguments)
"""


def port_in_a_folder(*arguments: str) -> Job:
    def make(folder: Path) -> Command:
        (folder / "mine_here.py").write_text(WARNING_PORT)
        tests = Path(__file__).parent.parent / "conformance"
        return "-m", "pytest", tests, *QUICK, *arguments

    return Job(make, in_folder=True)


IN_A_FOLDER = port_in_a_folder("--backend", "mine_here:Mine", "-k", "causal_logits")
UNKNOWN = port_in_a_folder("--backend", "not_here:Mine")


def test_a_port_in_the_current_folder_may_warn() -> None:
    done = IN_A_FOLDER.done()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "UserWarning: older" in done.stdout


def test_a_backend_that_is_not_there_is_one_line_and_exit_code_two() -> None:
    done = UNKNOWN.done()
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "--backend not_here:Mine: cannot be imported" in line
    assert "lie in the current folder" in line


def test_without_a_folder_the_conformance_tests_alone_are_collected() -> None:
    def make(_: Path) -> Command:
        here = f"import os; os.chdir({str(Path(__file__).parent)!r}); import pytest, sys"
        collect = f"sys.exit(pytest.main(['--collect-only', '-q', '--backend={WITH_ALL}']))"
        return "-c", f"{here}; {collect}"

    done = Job(make).done()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(known_checks())} tests collected" in done.stdout


WITH_ALL = "parity_tests.conformance.oracle:Oracle"
