"""Who may import whom, held in a fresh interpreter; and proof that these tests can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


def imported(statement: str) -> set[str]:
    """Run ``statement`` in a fresh interpreter; return the third-party packages it brought in."""
    program = (
        f"import sys; before = set(sys.modules)\n{statement}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in done.stdout.split() if not name.startswith(("_", "mtrand"))}


def test_the_oracle_imports_numpy_alone() -> None:
    modules = (
        "training_mutants, mutants, optim, grad, plain, model, tolerances, sampling, ops, naming, "
        "config"
    )
    assert imported(f"from reference_np import {modules}") == {"reference_np", "numpy"}


def test_the_oracles_checkpoint_adds_two() -> None:
    found = imported("import reference_np.checkpoint")
    assert found == {"reference_np", "numpy", "safetensors", "ml_dtypes"}


def test_the_torch_package_imports_the_oracle_in_one_module_alone() -> None:
    """The trainer works without it, until it is asked to verify."""
    paths = (ROOT / "llama_torch").glob("*.py")
    modules = sorted({path.stem for path in paths} - {"__init__", VERIFIER})
    with_triton = {"kernels", "kernel_step", "batch_kernels", "batch_step", "loss_kernel"}
    found = imported("; ".join(f"import llama_torch.{m}" for m in modules if m not in with_triton))
    assert "torch" in found
    assert not found & {"reference_np", "parity_tests", "tools", "transformers"}
    assert not found & {"tokenizers", "sentencepiece"}  # extras, for checkpoints that need them
    naming = {m for m in modules if "reference_np" in packages(source_of(m))}
    assert not naming  # inside functions neither
    found = imported(f"import llama_torch.{VERIFIER}")
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


def test_a_forbidden_import_would_be_seen() -> None:
    assert "safetensors" in imported("import reference_np.model, safetensors")
    assert "reference_np" in imported("import llama_torch.config, reference_np.config")
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
