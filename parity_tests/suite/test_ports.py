"""The ports of public packages, whose packages are not installed here, read as source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from reference_np.limits import Limits

from ..support.import_table import imports

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "parity_tests" / "ports"
PORTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
SUITES = {"numpy", "ml_dtypes"}  # packages that the suite brings
MODULES = {"llama_cpp_python": "llama_cpp"}  # of packages with another name


@cache
def tree(port: str) -> ast.Module:
    return ast.parse((FOLDER / f"{port}.py").read_text(encoding="utf-8"))


def required(port: str) -> tuple[str, ...]:
    """Return a port's pinned requirements."""
    values = [
        node.value
        for node in tree(port).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIRES"
    ]
    return ast.literal_eval(values[0])


def declared(port: str) -> list[dict]:
    """Return the arguments of each ``Limits`` of a port."""
    calls = [
        node
        for node in ast.walk(tree(port))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Limits"
    ]
    return [{k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in calls]


def rows() -> dict[str, list[str]]:
    """Return the requirements of each port in the table of docs/conformance.md."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| \[`(\w+)\.py`\]\(\.\./parity_tests/ports/.*?\| (.*?) \|", text, re.M)
    return {port: re.findall(r"`(.*?)`", packages) for port, packages in found}


def test_the_table_has_every_port_with_its_requirements() -> None:
    assert rows() == {port: list(required(port)) for port in PORTS}


@pytest.mark.parametrize("port", PORTS)
def test_a_port_pins_every_package_that_it_imports(port: str) -> None:
    pins = [re.fullmatch(r"([\w-]+)(\[\w+\])?==[\d.]+", one) for one in required(port)]
    assert all(pins), required(port)
    packages = [pin[1].replace("-", "_") for pin in pins if pin]
    names = {MODULES.get(package, package) for package in packages}
    ours = ("reference_np", "parity_tests")
    source = {f"parity_tests.ports.{port}": ast.unparse(tree(port))}
    others = {one.imported for one in imports(source)} - SUITES
    assert {name for name in others if name.partition(".")[0] not in ours} <= names


@pytest.mark.parametrize("port", PORTS)
def test_a_port_declares_limits_that_exist(port: str) -> None:
    assert declared(port)
    for fields in declared(port):
        assert Limits(**fields).declared() == fields
