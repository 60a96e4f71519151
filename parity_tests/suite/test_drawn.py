"""Examples are equal on every machine, and a failing one prints the numbers it was made from."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from ..conformance import drawn
from ..conformance.drawn import SEARCH
from ..conformance.strategies import cases, cases_for, wide_cases
from ..conformance.training_cases import training_cases
from ..support.jobs import environment

ROOT = Path(__file__).parent.parent.parent
# Prints what a derandomised test draws; its constants are far from any that chance would draw.
DRAWS = """
import sys
sys.path[:0] = [{root!r}, {folder!r}]
import hypothesis
from hypothesis import strategies as st
import parity_tests.conformance.drawn
if {ignores}:
    parity_tests.conformance.drawn.ignore_constants()
{imports}
found = []
@hypothesis.settings(derandomize=True, max_examples=400, database=None)
@hypothesis.given(st.integers(0, 2**62))
def test(number):
    found.append(number)
test()
print(hash(tuple(found)))
"""


def draws(folder: Path, imports: str, ignores: bool = True) -> str:
    """Return a digest of the numbers drawn in a subprocess."""
    script = folder / f"draws_{len(imports)}.py"
    script.write_text(
        DRAWS.format(root=str(ROOT), folder=str(folder), ignores=ignores, imports=imports)
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return found.stdout


def test_examples_do_not_depend_on_the_modules_that_are_loaded(tmp_path: Path) -> None:
    constants = ", ".join(str(7_000_003 + 91 * i) for i in range(200))
    (tmp_path / "local_module.py").write_text(f"CONSTANTS = [{constants}]\n")
    alone, beside = (draws(tmp_path, imports) for imports in ("", "import local_module"))
    assert alone == beside
    # And the test can fail: this is what Hypothesis does by itself.
    assert draws(tmp_path, "import local_module", ignores=False) != alone


@pytest.mark.parametrize("profile", ["quick", "default"])
def test_profiles_that_prove_draw_the_same_everywhere(profile: str) -> None:
    found = settings.get_profile(profile)
    assert found.derandomize
    assert found.database is None


@pytest.mark.parametrize("profile", ["search", "thorough"])
def test_profiles_that_search_draw_anew(profile: str) -> None:
    assert not settings.get_profile(profile).derandomize


def test_a_large_example_does_not_hide_the_failure(tmp_path: Path) -> None:
    test = tmp_path / "test_large.py"
    test.write_text(
        "from hypothesis import given, strategies as st\n"
        "@given(st.just('x' * 40_000))\n"
        "def test(case):\n"
        "    assert not case, 'what failed'\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(test)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert found.returncode == 1
    assert "AssertionError: what failed" in found.stdout
    assert "FAILED" in found.stdout
    assert "HypothesisWarning" not in found.stdout.split("short test summary")[1]


@pytest.mark.parametrize(
    "strategy",
    [cases(), wide_cases(), cases_for("float64"), cases_for("bfloat16"), training_cases()],
    ids=["cases", "wide_cases", "cases_for_float64", "cases_for_bfloat16", "training_cases"],
)
def test_a_case_prints_as_what_rebuilds_it(strategy: st.SearchStrategy) -> None:
    longest = find(strategy, lambda case: case.config.n_layers > 1, settings=SEARCH)
    text = repr(longest)
    assert len(text) < 1000, text
    for label in ("n_kv_heads=", "vocab_size=", "weights seed="):
        assert label in text


def test_a_tuple_of_large_values_prints_as_its_numbers() -> None:
    @drawn.composite
    def large(draw: drawn.Draw) -> tuple:
        return drawn.labelled(("x" * draw(st.just(9999), label="length"), 1), draw.numbers)

    text, one = made = find(large(), lambda _: True, settings=SEARCH)
    assert (len(text), one) == (9999, 1)
    assert repr(made) == "(length=9999)"


def test_numbers_of_nested_strategies_are_listed_together() -> None:
    @drawn.composite
    def inner(draw: drawn.Draw) -> int:
        return draw(st.just(3), label="inner")

    @drawn.composite
    def outer(draw: drawn.Draw) -> str:
        draw(inner())
        draw(inner())
        draw(st.just("x"), label="outer")
        return drawn.format_numbers(draw.numbers)

    expected = "inner=3, inner#2=3, outer='x'"
    assert find(outer(), lambda _: True, settings=SEARCH) == expected
    assert drawn.format_numbers(drawn.last_example) == expected


def test_a_failure_tells_of_every_strategy_of_its_example() -> None:
    @drawn.composite
    def one(draw: drawn.Draw, label: str) -> int:
        return draw(st.just(3), label=label)

    found = []

    @settings(SEARCH, max_examples=3)
    @given(one("a"), one("b"), st.data())
    def test(a: int, b: int, data: st.DataObject) -> None:
        data.draw(one("a"))
        found.append(drawn.format_numbers(drawn.last_example))

    test()
    assert set(found) == {"a=3, b=3, a#2=3"}
