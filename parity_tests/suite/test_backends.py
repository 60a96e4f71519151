"""The suite's command line: nothing compared is not a pass, and errors are one line."""

from pathlib import Path

import numpy as np
import pytest

from reference_np import backend
from reference_np.config import InputError

from ..conformance.judge import Judge
from ..conformance.oracle import Oracle
from ..support.jobs import Command, Job


def suite(*arguments: str) -> Job:
    """Return a run of the suite with these arguments."""

    def make(_: Path) -> Command:
        quick = ["--hypothesis-profile", "quick", "-p", "no:cacheprovider", "-p", "no:xdist"]
        return "-m", "pytest", *quick, *arguments

    return Job(make)


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


class OddPrecision(Oracle):
    """A backend with an unknown dtype."""

    dtypes = ("float8",)


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
