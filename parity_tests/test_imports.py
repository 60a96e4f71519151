"""Who may import whom, held in a fresh interpreter; and proof that these tests can fail."""

import ast
from pathlib import Path

import pytest

from .ahead import Job

ROOT = Path(__file__).parent.parent
ORACLE_ORDER = [
    "config",
    "naming",
    "ops",
    "sampling",
    "tolerances",
    "checkpoint",
    "model",
    "grad",
    "plain",
]
ORACLE_ORDER += ["optim", "mutants", "training_mutants"]
VERIFIER = "verify"  # llama_torch's one module that imports the oracle


def importing(statement: str) -> Job:
    """Return a run of ``statement`` in a fresh interpreter."""
    program = (
        f"import sys; before = set(sys.modules)\n{statement}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    return Job(lambda _: ("-c", program))


def imported(job: Job) -> set[str]:
    """Return the third-party packages that a statement brought in."""
    done = job.done()
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.split() if not name.startswith(("_", "mtrand"))}


THE_ORACLE = importing(
    "from reference_np import training_mutants, mutants, optim, grad, plain, model, tolerances, "
    "sampling, ops, naming, config"
)


@pytest.mark.ahead(THE_ORACLE)
def test_the_oracle_imports_numpy_alone() -> None:
    assert imported(THE_ORACLE) == {"reference_np", "numpy"}


CHECKPOINT = importing("import reference_np.checkpoint")


@pytest.mark.ahead(CHECKPOINT)
def test_the_oracles_checkpoint_adds_two() -> None:
    found = imported(CHECKPOINT)
    assert found == {"reference_np", "numpy", "safetensors", "ml_dtypes"}


# Modules of the torch package that need no GPU's compiler, and may not need the oracle.
MODULES = sorted(
    {path.stem for path in (ROOT / "llama_torch").glob("*.py")} - {"__init__", VERIFIER}
)
WITH_TRITON = {"kernels", "kernel_step", "batch_kernels", "batch_step", "loss_kernel"}
WITHOUT = importing("; ".join(f"import llama_torch.{m}" for m in MODULES if m not in WITH_TRITON))
WITH = importing(f"import llama_torch.{VERIFIER}")


@pytest.mark.ahead(WITHOUT)
@pytest.mark.ahead(WITH)
def test_the_torch_package_imports_the_oracle_in_one_module_alone() -> None:
    """The trainer works without it, until it is asked to verify."""
    found = imported(WITHOUT)
    assert "torch" in found
    assert not found & {"reference_np", "parity_tests", "tools", "transformers"}
    assert not found & {"tokenizers", "sentencepiece"}  # extras, for checkpoints that need them
    naming = {m for m in MODULES if "reference_np" in packages(source_of(m))}
    assert not naming  # inside functions neither
    found = imported(WITH)
    assert found >= {"reference_np"}
    assert not found & {"parity_tests", "tools", "transformers"}


def source_of(module: str) -> str:
    return (ROOT / "llama_torch" / f"{module}.py").read_text(encoding="utf-8")


def packages(source: str) -> set[str]:
    """Name the packages that a source imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_of_the_tests_tools_use_the_backends_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "parity_tests"
        for alias in node.names
    ]
    of_tests = {n for n in named + names if n.startswith("parity_tests") and n != "parity_tests"}
    assert all(name.startswith("parity_tests.backends") for name in of_tests)


FORBIDDEN = importing("import reference_np.model, safetensors")
FORBIDDEN_TOO = importing("import llama_torch.config, reference_np.config")


@pytest.mark.ahead(FORBIDDEN)
@pytest.mark.ahead(FORBIDDEN_TOO)
def test_a_forbidden_import_would_be_seen() -> None:
    assert "safetensors" in imported(FORBIDDEN)
    assert "reference_np" in imported(FORBIDDEN_TOO)
    assert "reference_np" in packages("def f():\n    from reference_np.ops import embed")
    assert "reference_np" in packages(source_of(VERIFIER))


def inner_imports(source: str) -> set[str]:
    """Name the reference_np modules that a source imports, relatively or absolutely."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reference_np"):
            inner = (node.module or "").partition(".")[2]
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {name.partition(".")[2] for name in names if name.startswith("reference_np.")}
    return found


@pytest.mark.parametrize("name", ORACLE_ORDER)
def test_the_oracle_is_layered(name: str) -> None:
    allowed = set(ORACLE_ORDER[: ORACLE_ORDER.index(name)])
    source = (ROOT / "reference_np" / f"{name}.py").read_text(encoding="utf-8")
    assert inner_imports(source) <= allowed


def test_the_order_names_every_module() -> None:
    modules = {path.stem for path in (ROOT / "reference_np").glob("*.py")}
    assert modules - {"__init__"} == set(ORACLE_ORDER)


@pytest.mark.parametrize(
    "source",
    [
        "from .model import forward",
        "from . import model",
        "import reference_np.model",
        "from reference_np import model",
        "from reference_np.model import forward",
    ],
)
def test_a_wrong_layer_would_be_seen(source: str) -> None:
    assert inner_imports(source) == {"model"}
