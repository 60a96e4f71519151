"""Refuse a file of the user's, in a folder of modules, that hides an installed module."""

import sys
from pathlib import Path

from .errors import InputError

# What a command and its processes import by name besides Python's own library.
NEEDED = (
    *("numpy", "ml_dtypes", "safetensors", "hypothesis", "sortedcontainers", "tyro", "rich"),
    *("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "xdist", "execnet"),
    *("torch", "matplotlib"),
)
OURS = ("reference_np", "llama_common", "llama_parity", "llama_torch", "parity_tests")


def require_hides_nothing(path: Path, who: str) -> None:
    """Raise InputError for a module's file whose name is that of an installed module.

    Its folder comes first when modules are imported, so that NumPy itself would import a numpy.py.
    """
    name = path.stem
    if name in sys.stdlib_module_names or _is_found_elsewhere(path.resolve()):
        raise InputError(
            f"{who}: an installed module has the name {name}, and this file would be imported in "
            f"its place; give it another name, as my_{name}.py"
        )


def require_hides_none(folder: Path) -> None:
    """Raise InputError where a folder, which comes first, hides a module that a command needs.

    Of Python's own library they are those that are imported by now, as every process does.
    """
    own = sys.stdlib_module_names - set(sys.builtin_module_names)
    for name in (*NEEDED, *OURS, *sorted(own & sys.modules.keys())):
        files = [folder / f"{name}.py"]
        if name not in OURS:  # a clone has those as folders
            files.append(folder / name / "__init__.py")
        for file in files:
            if file.is_file() and _is_found_elsewhere(file.resolve()):
                raise InputError(
                    f"{file}: hides the installed module {name}, which the command needs; give it "
                    "another name, or run the command where it is not"
                )


def _is_found_elsewhere(file: Path) -> bool:
    """Return whether the module of a file is installed in another folder than the file's."""
    is_package = file.name == "__init__.py"
    folder, name = (
        (file.parent.parent, file.parent.name) if is_package else (file.parent, file.stem)
    )
    own = {folder, Path.cwd()}
    places = [place for place in sys.path if Path(place).resolve() not in own]
    found = [finder.find_spec(name, places) for finder in sys.meta_path]
    origins = [Path(spec.origin) for spec in found if spec is not None and spec.origin]
    # Of a package it is the file in its folder. An environment may lie in the port's folder.
    homes = [at.parent.parent if at.name == "__init__.py" else at.parent for at in origins]
    return any(home != folder for home in homes)
