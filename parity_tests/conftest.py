"""Options: ``--hypothesis-profile quick|default|thorough``, ``--backend``, ``--mutants``.

``--backend package.module:object`` (or PARITY_BACKEND) tests that implementation alone, through
test_conformance.py; ``--mutants`` runs the same tests on the oracle with each known bug in it.
"""

import os

# Before NumPy is imported; for the reason why torch gets one thread below.
THREADS = os.environ.get("PARITY_THREADS", "1")
WORKERS = 8  # processes at most; more would wait for each other's imports
os.environ.setdefault("OPENBLAS_NUM_THREADS", THREADS)

import functools
import gc
import importlib.util
import math
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_torch.training import dry_run, loop
from llama_torch.training.throughput import peak_flops
from reference_np.backend import SHIPPED, dtypes_of, load
from reference_np.config import InputError
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING

from . import backends
from .conformance import drawn
from .conformance.judge import JUDGE
from .conformance.oracle import WithBug
from .support import poison, processors, summary_tables

# Models here are too small for a second thread, and threads that wait for each other cost more
# than they bring wherever something else runs.
torch.set_num_threads(int(THREADS))

COMMON = {
    "deadline": None,  # the first example pays for torch's warm-up
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
# The same examples on every machine: a newcomer's green is CI's. To search is to ask for it.
settings.register_profile("quick", max_examples=5, derandomize=True, **COMMON)
settings.register_profile("default", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("search", max_examples=15, derandomize=False, **COMMON)
settings.register_profile("thorough", max_examples=2000, derandomize=False, **COMMON)
drawn.ignore_constants()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

MUTANTS = {mutant.name: mutant for mutant in (*FORWARD, *TRAINING)}
NAME = pytest.StashKey[str]()
PEAK_FLOPS = functools.cache(peak_flops)
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
    group.addoption(
        "--poison", action="store_true", help="let memory that nothing has written hold NaN"
    )
    group.addoption(
        "--reproduce", metavar="BLOB", help="run one failing example again, as its report says"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share a whole suite among processes, one a core, where pytest-xdist is installed.

    A single file or test is run at once: every process imports torch for some seconds.
    """
    option = config.option
    whole = all(Path(arg).is_dir() for arg in config.args) and not option.keyword
    if hasattr(config, "workerinput") or option.collectonly or option.usepdb:
        return
    if getattr(option, "numprocesses", 0) is None and whole:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(WORKERS, (cores or 1) // int(THREADS))
        if workers > 1:
            option.numprocesses, option.dist = workers, "worksteal"


def chosen(config: pytest.Config) -> list[str]:
    """Return the names of the backends asked for; empty = the default ones."""
    named = config.getoption("backend") or []
    return named or list(filter(None, [os.environ.get("PARITY_BACKEND")]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(method): what a backend must offer for this test")
    config.addinivalue_line("markers", "numeric: its numbers depend on the processor's kernels")
    if config.getoption("poison"):
        poison.install()
    JUDGE.only_record = config.getoption("mutants")
    if JUDGE.only_record and chosen(config):
        raise pytest.UsageError("--mutants and --backend exclude each other; leave one out")
    try:
        for name in chosen(config):
            load(name)
    except InputError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    if JUDGE.only_record:
        names = [HONEST, *MUTANTS]
    else:
        names = chosen(metafunc.config) or list(backends.DEFAULT)
    metafunc.parametrize("backend", [_parameter(name) for name in names])


def _parameter(name: str) -> Any:
    if JUDGE.only_record and name in MUTANTS:
        return pytest.param(WithBug(MUTANTS[name]), id=name)
    reason = ""
    if name in backends.CUDA and not torch.cuda.is_available():
        reason = "no CUDA device here"
    elif name == "transformers" and not importlib.util.find_spec("transformers"):
        reason = "transformers is not installed"
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(None if reason else load(name), id=name, marks=marks)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen(config) or JUDGE.only_record:
        others = [item for item in items if not _is_conformance(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_conformance(item)]
    if JUDGE.only_record:  # a bug is run through what it can reach
        items[:] = [item for item in items if not _lacks(item)]
    for item in filter(_is_conformance, items):
        item.stash[NAME] = _name(item)
        item.obj = _limited(item)
    blob = config.getoption("reproduce")
    if blob:
        if len(items) != 1:
            raise pytest.UsageError(f"--reproduce needs one test, {len(items)} are selected")
        reproduce = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())
        items[0].obj = reproduce(items[0].obj)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # torch's and transformers' half a million objects are not looked through again


def _is_conformance(item: pytest.Item) -> bool:
    return "backend" in getattr(item, "fixturenames", ())


def _name(item: Any) -> str:
    """Return the backend's id: the part of the item's that no other parameter made."""
    others = [str(v) for key, v in item.callspec.params.items() if key != "backend"]
    ids = item.callspec.id
    for other in others:
        ids = ids.removeprefix(f"{other}-").removesuffix(f"-{other}")
    return str(ids)


def _lacks(item: Any) -> str:
    """Return the method or precision that this test needs and its backend does not offer."""
    backend, values = item.callspec.params["backend"], item.callspec.params
    method = item.get_closest_marker("needs").args[0]
    if not callable(getattr(backend, method, None)):
        return str(method)
    dtype = values.get("dtype")
    dtypes = dtypes_of(backend)
    return "" if dtype is None or dtype in dtypes else dtype


def _limited(item: Any) -> Any:
    """Return the test with as many examples as its backend can afford."""
    share = getattr(item.callspec.params["backend"], "share", 1.0)
    # Hypothesis begins with the smallest example there is, which shows nothing.
    examples = max(3, math.ceil(share * settings.default.max_examples))
    test = given(data=st.data())(item.obj.hypothesis.inner_test)
    return settings(max_examples=examples)(test)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Tell the judge which test runs; nothing covered is not a pass."""
    with poison.watched(pyfuncitem):
        if not _is_conformance(pyfuncitem):
            return (yield)
        return (yield from _judged(pyfuncitem))


def _judged(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    test = pyfuncitem.originalname
    values = pyfuncitem.callspec.params
    others = [str(value) for key, value in values.items() if key != "backend"]
    name = pyfuncitem.stash[NAME]
    JUDGE.current = (" ".join([test.removeprefix("test_"), *others]), name)
    entry, lacks = JUDGE.entry, _lacks(pyfuncitem)
    if lacks:
        entry.not_covered[f"{lacks} is not offered"] += 1
        pytest.skip(f"not covered: {lacks} is not offered")
    result = yield
    if entry.covered == 0:
        reason = ", ".join(entry.not_covered) or "no example was compared"
        if test == "test_logits" and not JUDGE.only_record:
            pytest.fail(f"logits are required, and none were computed: {reason}", pytrace=False)
        pytest.skip(f"not covered: {reason}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """End a failing example's report with one line that runs it again."""
    found = yield
    notes = " ".join(getattr(call.excinfo.value, "__notes__", ())) if call.excinfo else ""
    blob = re.search(r"@reproduce_failure\('[^']*', b'([^']*)'\)", notes)
    if blob:
        line = f"pytest '{item.nodeid}' --reproduce {blob[1]}"
        line += "".join(f" --backend {name}" for name in chosen(item.config))
        found.sections.append(("run this example again", line))
    return found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("computed by")
    terminalreporter.write_line(processors.describe())
    if JUDGE.entries:
        lines = (
            summary_tables.mutation_table(JUDGE.entries, MUTANTS, HONEST)
            if JUDGE.only_record
            else summary_tables.backend_table(JUDGE.entries, in_full=bool(chosen(config)))
        )
        terminalreporter.section("parity")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the record of a process that ends (a hook of pytest-xdist's)."""
    JUDGE.add(getattr(node, "workeroutput", {}).get("judged", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of the whole suite that a mutant survives; hand on what a process recorded."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["judged"] = JUDGE.records()
        return
    whole = JUDGE.only_record and exitstatus == 0 and not session.config.getoption("keyword")
    if whole and summary_tables.survivors(JUDGE.entries, MUTANTS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _own_token_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the tests' token caches out of the user's, in one place for the whole run."""
    folder = Path(tmp_path_factory.getbasetemp()) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True)
def _peak_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine can do is the same for every run here, and takes most of a tiny one."""
    for module in (loop, dry_run):
        monkeypatch.setattr(module, "peak_flops", PEAK_FLOPS)


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """Undo what a training run sets for its whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
