"""The ports of public packages, read from their files without importing the packages."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.nearest import did_you_mean

PORTS = Path(__file__).parent.parent / "ports"
OBJECTS = ("Port", "Directory")  # the weights mapped by name; the package's own loader
CONSTANTS = ("REQUIRES", "VARIABLES", "NPM", "MINUTES", "NEEDS_GPU", "OBJECTS", "STATED")


@dataclass(frozen=True)
class Recorder:
    """A module of parity_tests/ports: what it tests, and what it needs.

    name         the module's name
    title        its docstring's first line
    requires     what pip installs, each with its version
    objects      the names of its backends
    variables    environment variables of its processes
    npm          what npm installs, each with its version; scripts of packages are not run
    minutes      the time limit of one backend's run
    needs_gpu    whether it runs on a CUDA device alone
    stated       keys of config.json, by how they begin, that its user states by hand: what the
                 package does not read is not checked as if it did
    """

    name: str
    title: str
    requires: tuple[str, ...]
    objects: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    npm: tuple[str, ...] = ()
    minutes: float = 10.0
    needs_gpu: bool = False
    stated: tuple[str, ...] = ()


def all_recorders() -> list[Recorder]:
    """Return the recorders of all ports by name."""
    files = sorted(PORTS.glob("[a-z]*.py"))
    return [found for file in files if (found := read_recorder(file)) is not None]


def chosen(names: list[str]) -> list[Recorder]:
    """Return the recorders of these names, or all; InputError for a name that is none's."""
    known = {recorder.name: recorder for recorder in all_recorders()}
    for name in names:
        if name not in known:
            meant = did_you_mean(name, known) or f" give some of {', '.join(known)}"
            raise InputError(f"{name}: no such port in parity_tests/ports;{meant}")
    return [known[name] for name in dict.fromkeys(names) or known]


def read_recorder(file: Path) -> Recorder | None:
    """Return what a port's file says of itself; None for a module that ports share."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    constants: dict[str, Any] = {}
    defined: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            defined += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in CONSTANTS:
                constants[name] = ast.literal_eval(node.value)
    if "REQUIRES" not in constants:
        return None
    title = (ast.get_docstring(tree) or file.stem).splitlines()[0]
    return Recorder(
        name=file.stem,
        title=title.removesuffix(".").removesuffix(", as a backend"),
        requires=constants["REQUIRES"],
        objects=constants.get("OBJECTS") or tuple(name for name in OBJECTS if name in defined),
        variables=constants.get("VARIABLES", {}),
        npm=constants.get("NPM", ()),
        minutes=constants.get("MINUTES", 10.0),
        needs_gpu=constants.get("NEEDS_GPU", False),
        stated=constants.get("STATED", ()),
    )
