"""No file is over 300 lines and no function over 50."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ..support.import_table import PACKAGES

ROOT = Path(__file__).parent.parent.parent
MAX_LINES, MAX_FUNCTION_LINES = 300, 50
# Catalogues of bugs, read entry by entry.
LONG_FILES = tuple(
    f"reference_np/{name}.py" for name in ("mutants", "training_mutants", "fine_tuning_mutants")
)
# Triton kernels are one function each: what they call is compiled into them.
LONG_FUNCTIONS = "llama_torch/kernels/"


def sources() -> dict[str, str]:
    """Return the text of every Python file of the project by its path."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def too_long(files: Mapping[str, str]) -> Iterator[str]:
    """Yield the files and functions beyond the limits."""
    for path, text in files.items():
        if text.count("\n") > MAX_LINES and path not in LONG_FILES:
            yield path
        if path.startswith(LONG_FUNCTIONS):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
                    yield f"{path}: {node.name}"


def test_files_and_functions_are_short() -> None:
    files = sources()
    assert len(files) > 200
    assert not set(too_long(files))


def function(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("tools/a.py", "x = 1\n" * 300, []),
        ("tools/a.py", "x = 1\n" * 301, ["tools/a.py"]),
        ("reference_np/mutants.py", "x = 1\n" * 301, []),
        ("tools/a.py", function(50), []),
        ("tools/a.py", function(51), ["tools/a.py: f"]),
        ("tools/a.py", "async " + function(51), ["tools/a.py: f"]),
        ("reference_np/mutants.py", function(51), ["reference_np/mutants.py: f"]),
        ("llama_torch/kernels/a.py", function(51), []),
    ],
)
def test_what_is_too_long_would_be_seen(path: str, text: str, found: list[str]) -> None:
    assert list(too_long({path: text})) == found
