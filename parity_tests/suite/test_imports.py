"""Allowed imports, checked in the sources and in fresh interpreters."""

from functools import cache
from pathlib import Path

import pytest

from ..support import import_table
from ..support.import_table import ALLOWED, Import, circles, imports, part_of, sources, violations
from ..support.jobs import Job

ROOT = Path(__file__).parent.parent.parent
SOURCES = sources(ROOT)
ORACLE_ORDER = [
    *(
        "config",
        "limits",
        "naming",
        "ops",
        "sampling",
        "tolerances",
        "foreign",
        "weight_files",
        "checkpoint",
        "model",
        "grad",
    ),
    *(
        "angle_error",
        "float8",
        "low_precision",
        "optim",
        "sft",
        "masked",
        "reward",
        "reward_model",
        "divergence",
        "policy",
        "ppo",
        "mutants",
        "training_mutants",
        "fine_tuning_mutants",
        "shipped",
        "importing",
        "backend",
        "refusals",
    ),
]
READERS = ("weight_files", "checkpoint")  # import safetensors too
VERIFIER = "llama_torch.training.verify"
# The modules of llama_torch that import the oracle.
VERIFIERS = (
    *("llama_torch.training.oracle", "llama_torch.training.error_bounds"),
    *("llama_torch.training.float8_check", VERIFIER),
)


@cache
def all_imports() -> list[Import]:
    """Return every import of the project; not at import, as it takes a second."""
    return imports(SOURCES)


def importing(modules: str, first: str = "") -> Job:
    """Return a job that imports modules in a fresh interpreter and prints the packages imported.

    ``first`` is run before; its imports do not count.
    """
    program = (
        f"import sys\n{first}\nbefore = set(sys.modules)\nimport {modules}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    return Job(lambda _: ("-c", program))


def imported(job: Job) -> set[str]:
    """Return the packages that a job's statement has imported, without the standard library."""
    done = job.done()
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.split() if not name.startswith(("_", "mtrand"))}


# The table


def test_every_import_is_allowed() -> None:
    assert not violations(all_imports())


def test_every_module_has_a_part_and_every_part_a_module() -> None:
    assert {part_of(module) for module in SOURCES} == set(ALLOWED)
    assert {name for allowed in ALLOWED.values() for name in allowed} <= set(ALLOWED)


def test_sub_packages_are_walked() -> None:
    assert {"parity_tests.backends", "parity_tests.backends.template"} <= set(SOURCES)


PLANTED = {
    "reference_np.inner": "def f():\n    import torch",
    "llama_torch.inner.one": "from reference_np import ops",
    "llama_torch.inner.two": "import parity_tests.conformance.strategies",
    "llama_torch.inner.three": "def f():\n    from llama_parity.comparison import judging",
    "llama_torch.model.inner": "def f():\n    from ..data import corpus",
    "llama_torch.data.inner": "from ..checkpoint.hf import load_model",
    "llama_torch.inference.inner": "from ..training.step import train_step",
    "llama_torch.training.inner": "from ..train import main",
    "llama_torch.training.other": "from reference_np.ops import linear",
    "llama_torch.four": "import triton.language as tl",
    "llama_torch.five": "from transformers import LlamaForCausalLM",
    "tools.inner": "from parity_tests import conformance",
    "parity_tests.conformance.inner": "def f():\n    import torch",
    "parity_tests.conformance.other": "from llama_torch import load",
}
HARMLESS = {
    "llama_torch.training.inner": (
        "import os, torch\nfrom ... import model\nfrom ...model.loss import loss_sum"
    ),
    "llama_torch.training.inner.one": "from . import two\nfrom ....reference import np",
    "reference_np.inner": "import numpy as np\nfrom .ops import linear\nfrom . import ops",
}


@pytest.mark.parametrize(("module", "source"), PLANTED.items())
def test_a_planted_import_is_seen(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    [found] = violations(imports(SOURCES | sources(tmp_path)))
    assert found.startswith(f"{module}:")


def test_what_is_allowed_is_not_called_wrong() -> None:
    found = imports(HARMLESS | {"llama_torch.training.inner.two": ""} | SOURCES)
    assert not violations(found)
    assert ("llama_torch.training.inner", "llama_torch.model.loss", 3) in found
    assert ("llama_torch.training.inner.one", "llama_torch.training.inner.two", 1) in found


def test_circles_are_found() -> None:
    arrows = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e"), ("d", "f")]
    assert circles(arrows) == [{"a", "b", "c"}]


def test_parts_import_each_other_in_no_circle() -> None:
    arrows = {
        (part_for_circles(one.importer), part_for_circles(one.imported))
        for one in all_imports()
        if is_ours(one.imported)
    }
    assert len(arrows) > 40
    assert not circles(arrows)


def test_modules_import_each_other_in_no_circle() -> None:
    """Neither inside a package nor by imports inside functions."""
    assert not circles_of_modules(all_imports())


def test_a_circle_of_modules_would_be_seen() -> None:
    planted = {
        "llama_torch.model.one": "from .two import b",
        "llama_torch.model.two": "def f():\n    from . import three",
        "llama_torch.model.three": "if True:\n    import llama_torch.model.one",
    }
    assert circles_of_modules(imports(SOURCES | planted)) == [set(planted)]


def circles_of_modules(found: list[Import]) -> list[set[str]]:
    return circles((one.importer, one.imported) for one in found if is_ours(one.imported))


def part_for_circles(module: str) -> str:
    """Return a module's part; the modules of --verify-every count as llama_torch.training."""
    return next((p for p in ["llama_torch.training"] if module.startswith(p)), part_of(module))


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in import_table.PACKAGES


# Inside the oracle


def oracle_imports(found: list[Import], module: str) -> set[str]:
    prefix = "reference_np."
    return {
        imported.removeprefix(prefix)
        for importer, imported, _ in found
        if importer == prefix + module and imported.startswith(prefix)
    }


@pytest.mark.parametrize("name", ORACLE_ORDER)
def test_the_oracle_is_layered(name: str) -> None:
    assert oracle_imports(all_imports(), name) <= set(ORACLE_ORDER[: ORACLE_ORDER.index(name)])


def test_the_order_names_every_module() -> None:
    modules = {name for name in SOURCES if name.startswith("reference_np.")}
    assert modules == {f"reference_np.{name}" for name in ORACLE_ORDER}


@pytest.mark.parametrize(
    "source",
    [
        "from .model import forward",
        "from . import model",
        "import reference_np.model",
        "from reference_np import model",
        "from reference_np.model import forward",
        "def f():\n    from .model import forward",
    ],
)
def test_a_wrong_layer_would_be_seen(source: str) -> None:
    found = imports(SOURCES | {"reference_np.ops": source})
    assert oracle_imports(found, "ops") == {"model"}


# In fresh interpreters


THE_ORACLE = importing(
    ", ".join(f"reference_np.{name}" for name in ORACLE_ORDER if name not in READERS)
)
CHECKPOINT = importing("reference_np.checkpoint")


def test_the_oracle_imports_numpy_alone_and_its_checkpoint_two_more() -> None:
    assert imported(THE_ORACLE) == {"reference_np", "numpy"}
    assert imported(CHECKPOINT) == {"reference_np", "numpy", "safetensors", "ml_dtypes"}


# Kernels too: a wrong import in them would be seen on a GPU alone.
STUB = "import torch; from parity_tests.support import triton_stub; triton_stub.install()"
PROGRAM = [n for n in SOURCES if n.startswith("llama_torch") and n not in VERIFIERS]
WITHOUT = importing(", ".join(PROGRAM), STUB)
WITH = importing(VERIFIER)


def test_the_torch_package_imports_the_oracle_in_one_module_alone() -> None:
    """The trainer needs the oracle for --verify-every alone."""
    found = imported(WITHOUT)
    assert "llama_torch" in found
    assert not found & {"reference_np", "parity_tests", "tools", "transformers"}
    assert not found & {"tokenizers", "sentencepiece"}  # extras, for checkpoints that need them
    found = imported(WITH)
    assert found >= {"llama_torch", "reference_np", "torch"}
    assert not found & {"parity_tests", "tools", "transformers"}


CONFORMANCE = importing(
    ", ".join(name for name in SOURCES if part_of(name) == "parity_tests.conformance")
)


def test_the_conformance_suite_stands_on_the_specification_alone() -> None:
    found = imported(CONFORMANCE)
    assert found >= {"hypothesis", "numpy", "parity_tests", "pytest", "reference_np", "safetensors"}
    assert not found & {"llama_torch", "llama_parity", "tools", "torch", "transformers"}


FORBIDDEN = importing("reference_np.model, safetensors")
FORBIDDEN_TOO = importing("llama_torch.config, reference_np.config", STUB)


def test_a_forbidden_import_would_be_seen() -> None:
    assert "safetensors" in imported(FORBIDDEN)
    assert "reference_np" in imported(FORBIDDEN_TOO)


# Kernels that are not used because their import failed would be slow, and no test's failure.
HALF_A_TRITON = Job(
    lambda _: (
        "-c",
        "import sys, types\nfrom llama_torch.model import loss\n"
        "sys.modules['triton'] = types.ModuleType('triton')\nloss._kernel()",
    )
)


def test_a_kernels_import_that_fails_is_an_error() -> None:
    done = HALF_A_TRITON.done()
    assert done.returncode == 1
    assert "'triton' is not a package" in done.stderr.splitlines()[-1]
