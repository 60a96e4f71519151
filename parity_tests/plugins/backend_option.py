"""The options --backend and --mutants: the implementations that the conformance tests run on.

``--backend package.module:object`` or ``FILE.py:object`` (or PARITY_BACKEND) runs the tests of
conformance/ on that implementation alone; ``--mutants`` runs them on the oracle with each known
bug. A backend's ``example_fraction`` sets the number of examples.
"""

import argparse
import importlib
import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_np.backend import SHIPPED, example_fraction_of, load
from reference_np.config import InputError
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING

from .. import backends
from ..conformance.judge import JUDGE
from ..conformance.oracle import WithBug
from ..conformance.scope import count_tests, excluded_by, is_drawn, lacking

CONFORMANCE = Path(__file__).parent.parent / "conformance"
FINE_TUNING_BUGS = CONFORMANCE.parent / "oracle" / "test_fine_tuning_mutants.py"
# Training has other examples in float32, which many ports have alone: its bugs are run there too.
IN_FLOAT32 = {f"{mutant.name} (float32)": mutant for mutant in TRAINING}
MUTANTS = {mutant.name: mutant for mutant in (*FORWARD, *TRAINING)} | IN_FLOAT32
# The least examples that a backend under --backend is compared on, over all tests that it offers:
# of one that offers little, each test has more.
LEAST_EXAMPLES = 40
CALLED = ("test_conformance", "test_long_sequences")  # the modules of tests on mapped weights
USAGE = 2  # the exit code of bad input, as of every tool here
HONEST = "torch"  # the correct implementation whose errors are printed beside the mutants'


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption(
        "--backend",
        action="append",
        metavar="MODULE:OBJECT",
        help="test this implementation alone (repeatable; or set PARITY_BACKEND): "
        f"package.module:object, FILE.py:object, or one of {', '.join(SHIPPED)}",
    )
    group.addoption("--of-command", default="", help=argparse.SUPPRESS)
    group.addoption("--mutants", action="store_true", help="run the suite against every known bug")


def requested_backends(config: pytest.Config) -> list[str]:
    """Return the backends named by --backend or PARITY_BACKEND; empty for the default ones."""
    named = config.getoption("backend") or []
    return named or list(filter(None, [os.environ.get("PARITY_BACKEND")]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(method): what a backend must offer for this test")
    config.addinivalue_line("markers", "under_mutants: judges mutants, and runs with --mutants too")
    config.addinivalue_line("markers", "numeric: its numbers depend on the processor's kernels")
    JUDGE.only_record = config.getoption("mutants")
    if JUDGE.only_record and requested_backends(config):
        pytest.exit("--mutants and --backend exclude each other; leave one out", USAGE)
    try:
        for name in requested_backends(config):
            load(name)
    except InputError as error:
        pytest.exit(str(error), USAGE)
    if requested_backends(config) and config.args_source is config.ArgsSource.INVOCATION_DIR:
        config.args[:] = [str(CONFORMANCE)]  # in any folder of the repository


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip every test outside conformance/, without importing it, under --backend and --mutants.

    With --mutants the tests of fine-tuning's bugs, which no backend has, are kept.
    """
    asked_for = requested_backends(config) or config.getoption("mutants")
    ours = CONFORMANCE.parent in collection_path.parents
    kept = [CONFORMANCE] if requested_backends(config) else [CONFORMANCE, FINE_TUNING_BUGS]
    inside = any(
        collection_path.is_relative_to(path) or collection_path in path.parents for path in kept
    )
    return True if asked_for and ours and not inside else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    if JUDGE.only_record:
        names = [HONEST, *MUTANTS]
    else:
        names = requested_backends(metafunc.config) or list(_default(metafunc.module.__name__))
    metafunc.parametrize("backend", [_parameter(name) for name in names])


def _default(module: str) -> tuple[str, ...]:
    """Return the backends that a module's tests run on where none is asked for."""
    of_directories = module.rpartition(".")[2] == "test_directories"
    return backends.WITH_LOADER if of_directories else backends.DEFAULT


def _parameter(name: str) -> Any:
    """Return the pytest parameter of a backend's name or of a mutant.

    A backend is imported when its first test runs.
    """
    if JUDGE.only_record and name in MUTANTS:
        dtype = "float32" if name in IN_FLOAT32 else "float64"
        return pytest.param(WithBug(MUTANTS[name], dtype), id=name)
    reason = _skip_reason(name)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(name, id=name, marks=marks)


def _skip_reason(name: str) -> str:
    """Return the reason for which a shipped backend cannot run on this machine; "" if it can.

    A shipped backend that needs a package other than torch is listed here; the name of one that
    needs a GPU begins with "cuda" (backends.CUDA).
    """
    needed = {"jax": ["jax"], "transformers": ["torch", "transformers"]}.get(name, ["torch"])
    for package in needed if name in SHIPPED else []:
        if not importlib.util.find_spec(package):
            return f"{package} is not installed"
    if name in backends.CUDA:
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device here"
    if name == "torch-native":
        from parity_tests.backends.decoding_backends import has_native

        return "" if has_native() else "no C compiler with OpenMP here"
    return ""


def backend_of(item: Any) -> Any:
    """Return the implementation that a conformance test runs on."""
    given = item.callspec.params["backend"]
    return load(given) if isinstance(given, str) else given


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if requested_backends(config) or JUDGE.only_record:
        others = [item for item in items if not _is_asked_for(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_asked_for(item)]
        for item in items:
            if requested_backends(config) and backend_name(item) not in SHIPPED:
                item.add_marker(pytest.mark.filterwarnings("default"))  # a warning is no failure
    if JUDGE.only_record:  # a mutant has only the methods that its bug changes, and no loader
        items[:] = [
            item
            for item in items
            if not is_conformance(item)
            or (
                not unsupported_by_backend(item)
                and not _needs(item, "from_directory")
                and not _is_spared(item)
            )
        ]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Import the test's backend, and set its number of examples."""
    if is_conformance(item) and not item.get_closest_marker("skip"):
        item.callspec.params["backend"] = backend_of(item)
        if is_drawn(item.obj):
            item.obj = _with_its_examples(item)


def _is_asked_for(item: pytest.Item) -> bool:
    """Return whether a test runs under --backend, or under --mutants where that is given."""
    judges_mutants = JUDGE.only_record and item.get_closest_marker("under_mutants") is not None
    return is_conformance(item) or judges_mutants


def _needs(item: pytest.Item, method: str) -> bool:
    """Return whether a test needs a method of its backend."""
    return any(mark.args == (method,) for mark in item.iter_markers("needs"))


def _is_spared(item: Any) -> bool:
    """Return whether a test is left out for a mutant in float32: training but for three steps."""
    return backend_name(item) in IN_FLOAT32 and item.callspec.params.get("steps", 3) != 3


def is_conformance(item: pytest.Item) -> bool:
    """Return whether a test runs on every backend."""
    return "backend" in getattr(item, "fixturenames", ())


def backend_name(item: Any) -> str:
    """Return the backend's part of a test's id."""
    ids = item.callspec.id
    for other in other_parameters(item):
        ids = ids.removeprefix(f"{other}-").removesuffix(f"-{other}")
    # Pytest escapes an id's letters other than ASCII: those of a file's name, say.
    named = (name for name in requested_backends(item.config) if _as_id(name) == ids)
    return next(named, str(ids))


def _as_id(name: str) -> str:
    return name.encode("unicode_escape").decode()


def other_parameters(item: Any) -> list[str]:
    """Return the values of a test's parameters other than its backend, as text."""
    return [str(value) for key, value in item.callspec.params.items() if key != "backend"]


def check_id(item: Any) -> str:
    """Return a conformance test's id without its backend, as test_logits_in[float32]."""
    others = "-".join(other_parameters(item))
    return f"{item.originalname}[{others}]" if others else str(item.originalname)


def command_of(config: pytest.Config) -> str:
    """Return the command line of llama-parity that runs the tests; "" under pytest alone."""
    return str(config.getoption("of_command"))


def unsupported_by_backend(item: Any) -> str:
    """Return the method or precision that a test needs and its backend lacks; "" if none."""
    method = item.get_closest_marker("needs").args[0]
    return lacking(backend_of(item), method, item.callspec.params.get("dtype"))


def beyond_a_limit(item: Any) -> str:
    """Return the declared limit of its backend that leaves no example of a test; "" if none."""
    return excluded_by(item.originalname, backend_of(item))


def _counted_together(module: ModuleType) -> list[ModuleType]:
    """Return the modules whose tests share the least number of examples with a module's."""
    package, _, name = module.__name__.rpartition(".")
    if name not in CALLED:
        return [module]
    return [importlib.import_module(f"{package}.{other}") for other in CALLED]


def _with_its_examples(item: Any) -> Any:
    """Return the test with the backend's number of examples, at least three.

    It is the backend's fraction of the profile's; a backend that is asked for by name and offers
    little, or runs a small fraction, has more of each test.
    """
    backend = backend_of(item)
    examples = math.ceil(example_fraction_of(backend) * settings.default.max_examples)
    if requested_backends(item.config):
        n_tests = max(1, count_tests(_counted_together(item.module), backend))
        examples = max(examples, math.ceil(LEAST_EXAMPLES / n_tests))
    # Hypothesis begins with the smallest example there is, which can show few bugs.
    test = given(data=st.data())(item.obj.hypothesis.inner_test)
    return settings(max_examples=max(3, examples), report_multiple_bugs=False)(test)
