"""Which implementations the conformance tests run on: ``--backend`` and ``--mutants``.

``--backend package.module:object`` (or PARITY_BACKEND) runs test_conformance.py on that
implementation alone; ``--mutants`` runs it on the oracle with each known bug. A backend's
``example_fraction`` sets the number of examples.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_np.backend import SHIPPED, dtypes_of, example_fraction_of, load
from reference_np.config import InputError
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING

from .. import backends
from ..conformance.judge import JUDGE
from ..conformance.oracle import WithBug

CONFORMANCE = Path(__file__).parent.parent / "conformance"
MUTANTS = {mutant.name: mutant for mutant in (*FORWARD, *TRAINING)}
HONEST = "torch"  # stands beside the mutants


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption(
        "--backend",
        action="append",
        metavar="MODULE:OBJECT",
        help="test this implementation alone (repeatable; or set PARITY_BACKEND): "
        f"package.module:object, or one of {', '.join(SHIPPED)}",
    )
    group.addoption("--mutants", action="store_true", help="run the suite against every known bug")


def chosen(config: pytest.Config) -> list[str]:
    """Return the names of the backends asked for; empty = the default ones."""
    named = config.getoption("backend") or []
    return named or list(filter(None, [os.environ.get("PARITY_BACKEND")]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(method): what a backend must offer for this test")
    config.addinivalue_line("markers", "numeric: its numbers depend on the processor's kernels")
    JUDGE.only_record = config.getoption("mutants")
    if JUDGE.only_record and chosen(config):
        raise pytest.UsageError("--mutants and --backend exclude each other; leave one out")
    try:
        for name in chosen(config):
            load(name)
    except InputError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no other test of ours where an implementation or the mutants are asked for."""
    asked_for = chosen(config) or config.getoption("mutants")
    ours = CONFORMANCE.parent in collection_path.parents
    inside = collection_path.is_relative_to(CONFORMANCE)
    return True if asked_for and ours and not inside else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    if JUDGE.only_record:
        names = [HONEST, *MUTANTS]
    else:
        names = chosen(metafunc.config) or list(backends.DEFAULT)
    metafunc.parametrize("backend", [_parameter(name) for name in names])


def _parameter(name: str) -> Any:
    """Return a backend's name, to be imported when its first test runs, or a mutant."""
    if JUDGE.only_record and name in MUTANTS:
        return pytest.param(WithBug(MUTANTS[name]), id=name)
    reason = _why_not(name)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(name, id=name, marks=marks)


def _why_not(name: str) -> str:
    """Return why a shipped backend cannot run here; "" if it can."""
    needed = {"jax": ["jax"], "transformers": ["torch", "transformers"]}.get(name, ["torch"])
    for package in needed if name in SHIPPED else []:
        if not importlib.util.find_spec(package):
            return f"{package} is not installed"
    if name in backends.CUDA:
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device here"
    return ""


def backend_of(item: Any) -> Any:
    """Return the implementation that a conformance test runs on."""
    given = item.callspec.params["backend"]
    return load(given) if isinstance(given, str) else given


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen(config) or JUDGE.only_record:
        others = [item for item in items if not is_conformance(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_conformance(item)]
    if JUDGE.only_record:  # a bug is run through what it can reach
        items[:] = [item for item in items if not lacks(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Import the test's backend, and draw as many examples as it can afford."""
    if is_conformance(item) and not item.get_closest_marker("skip"):
        item.callspec.params["backend"] = backend_of(item)
        item.obj = _limited(item)


def is_conformance(item: pytest.Item) -> bool:
    """Return whether a test runs on every backend."""
    return "backend" in getattr(item, "fixturenames", ())


def backend_name(item: Any) -> str:
    """Return the backend's id: the part of the item's that no other parameter made."""
    ids = item.callspec.id
    for other in other_parameters(item):
        ids = ids.removeprefix(f"{other}-").removesuffix(f"-{other}")
    return str(ids)


def other_parameters(item: Any) -> list[str]:
    """Return the values of a test's parameters other than its backend, as text."""
    return [str(value) for key, value in item.callspec.params.items() if key != "backend"]


def lacks(item: Any) -> str:
    """Return the method or precision that this test needs and its backend does not offer."""
    backend, method = backend_of(item), item.get_closest_marker("needs").args[0]
    if not callable(getattr(backend, method, None)):
        return str(method)
    dtype = item.callspec.params.get("dtype")
    return "" if dtype is None or dtype in dtypes_of(backend) else dtype


def _limited(item: Any) -> Any:
    """Return the test with as many examples as its backend can afford."""
    # Hypothesis begins with the smallest example there is, which shows nothing.
    examples = max(
        3, math.ceil(example_fraction_of(backend_of(item)) * settings.default.max_examples)
    )
    test = given(data=st.data())(item.obj.hypothesis.inner_test)
    return settings(max_examples=examples)(test)
