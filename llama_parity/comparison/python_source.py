"""Say how a port in a Python file is named: ``FILE.py:Class`` or ``module:Class``."""

import ast
from pathlib import Path


def naming_hint(spec: str, flag: str) -> str:
    """Return how ``flag`` names the port in a Python file or module ``spec``; "" for neither."""
    path = Path(spec)
    if path.suffix != ".py":
        path = Path(*spec.split(".")).with_suffix(".py") if spec else path
    if not path.is_file():
        return ""
    names = ports_in(path) or ["ClassName"]
    given = " or ".join(f"{flag} {spec}:{name}".strip() for name in names)
    return f"{flag} {spec}: {path.name} is Python source: give {given}".strip()


def ports_in(path: Path) -> list[str]:
    """Return the names of a Python file's classes that have, or inherit in the file, ``logits``.

    The file is not run. No names where it is not Python.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found: list[str] = []
    for node in classes:
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        if "logits" in methods or bases & set(found):
            found.append(node.name)
    return found
