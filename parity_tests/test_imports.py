"""Who may import whom, held in a fresh interpreter; and proof that these tests can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORACLE_ORDER = ["config", "naming", "ops", "model", "grad", "optim", "mutants"]


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
    modules = "mutants, optim, grad, model, tolerances, ops, naming, config"
    assert imported(f"from reference_np import {modules}") == {"reference_np", "numpy"}


def test_the_oracles_checkpoint_adds_two() -> None:
    found = imported("import reference_np.checkpoint")
    assert found == {"reference_np", "numpy", "safetensors", "ml_dtypes"}


def test_the_torch_package_never_imports_the_oracle() -> None:
    found = imported("import llama_torch.train, llama_torch.generate, llama_torch.trace")
    assert "torch" in found
    assert not found & {"reference_np", "parity_tests", "tools", "transformers"}


def test_a_forbidden_import_would_be_seen() -> None:
    assert "safetensors" in imported("import reference_np.model, safetensors")
    assert "reference_np" in imported("import llama_torch.config, reference_np.config")


def relative_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", ORACLE_ORDER)
def test_the_oracle_is_layered(name: str) -> None:
    allowed = set(ORACLE_ORDER[: ORACLE_ORDER.index(name)])
    assert relative_imports(ROOT / "reference_np" / f"{name}.py") <= allowed


def test_layering_would_be_seen() -> None:
    found = relative_imports(ROOT / "reference_np" / "model.py")
    assert {"ops", "naming", "config"} <= found
