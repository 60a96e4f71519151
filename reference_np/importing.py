"""Import the object that ``package.module:object`` or ``FILE.py:object`` names."""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import InputError
from .shipped import EXTRAS, SHIPPED

FILE = re.compile(r"(.*\.py)(?::([\w.]*))?", re.DOTALL)
MACHINERY = {Path(__file__).parent, Path(importlib.__file__).parent}  # of the import itself
INSTALLED = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib")}


def named_object(spec: str) -> Any:
    """Return the object that a backend's name stands for, an instance where it is a class.

    Raises InputError with what is wrong and the remedy, without the name.
    """
    target = SHIPPED.get(spec, spec)
    module_name, path = _parts(target)
    try:
        file = file_of(target)
        module = _import_module(module_name) if file is None else _import_file(file)
        found: Any = module
        for part in path.split(".") if path else ():
            found = getattr(found, part)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's module does
        remedy = _remedy(spec, module_name, path, error)
        raise InputError(f"cannot be imported ({_described(error)}); {remedy}") from error
    return _made(found, spec) if inspect.isclass(found) else found


def file_of(spec: str) -> Path | None:
    """Return the file of ``FILE.py:object``; None for ``package.module:object``."""
    found = FILE.fullmatch(spec)
    return Path(found[1]).resolve() if found else None


def module_of(spec: str) -> ModuleType:
    """Return the module of a backend that was loaded by this name."""
    return sys.modules[_parts(SHIPPED.get(spec, spec))[0]]


def _parts(target: str) -> tuple[str, str]:
    """Return the name of the module and the path of the object in it; "" for the module itself."""
    if found := FILE.fullmatch(target):
        return Path(found[1]).resolve().stem, found[2] or ""
    module_name, _, path = target.partition(":")
    return module_name, path


def _import_module(name: str) -> ModuleType:
    """Import a module by its name; the current folder comes first.

    Raises InputError where the current folder has a file for it and another one was imported.
    """
    here = Path.cwd()
    _require_on_path(here)
    module = importlib.import_module(name)
    place = here.joinpath(*name.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file() and _origin(module) != file.resolve():
            shown = file.relative_to(here)
            raise InputError(
                f"a module {name} of another place, {_origin(module) or 'built into Python'}, is "
                f"imported in place of {shown} here; give {shown} another name"
            )
    return module


def _import_file(file: Path) -> ModuleType:
    """Import a module by its file; its folder comes first for what it imports, as for a script.

    Raises InputError where there is none, and where another module of its name was imported.
    """
    if not file.is_file():
        raise InputError("no such file; give FILE.py:object or package.module:object")
    loaded = sys.modules.get(file.stem)
    if loaded is not None and _origin(loaded) != file:
        raise InputError(
            f"a module {file.stem} of another place, {_origin(loaded) or 'built into Python'}, is "
            f"imported already; give {file.name} another name"
        )
    if loaded is not None:
        return loaded
    _require_on_path(Path.cwd())
    if sys.path[0] != str(file.parent):
        sys.path.insert(0, str(file.parent))  # for good: the module may import others later
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None  # of a file that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def _require_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _origin(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _made(kind: Any, spec: str) -> Any:
    """Return an instance of a backend's class; InputError where its constructor fails."""
    try:
        return kind()
    except (Exception, SystemExit) as error:
        remedy = "it is called without arguments"
        if isinstance(error, ModuleNotFoundError):
            remedy = _of_extra(spec) or _to_install(error)
        raise InputError(f"its constructor failed ({_described(error)}); {remedy}") from error


def _described(error: BaseException) -> str:
    """Return an error's type and text, and the line of the caller's own code that raised it."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and Path(frame.filename).parent not in MACHINERY
    ]
    own = [frame for frame in frames if INSTALLED.isdisjoint(Path(frame.filename).parents)]
    at = (own or frames)[-1:]
    return f"{why}, at {at[0].filename}:{at[0].lineno}" if at else why


def _remedy(spec: str, module_name: str, path: str, error: BaseException) -> str:
    """Return what to do about the error of importing a backend."""
    if remedy := _of_extra(spec):
        return remedy
    file = file_of(spec)
    if file is not None and "attempted relative import" in str(error):
        return _in_package(file, path)
    if file is None and ":" not in spec:
        return f"give package.module:object, FILE.py:object or one of {', '.join(SHIPPED)}"
    if isinstance(error, ModuleNotFoundError):
        if not f"{module_name}.".startswith(f"{error.name}."):
            return _to_install(error)
        if Path(f"{module_name}.py").is_file():  # a path without its ending
            return f"give {module_name}.py:{path}"
        return "the module must be installed or lie in the current folder"
    if isinstance(error, AttributeError) and module_name in sys.modules:
        near = difflib.get_close_matches(path, dir(sys.modules[module_name]), 1)
        named = spec.removesuffix(path)
        return f"did you mean {named}{near[0]}?" if near else "it has no such object"
    return "its module failed while it was imported"


def _of_extra(spec: str) -> str:
    """Return the remedy for a shipped backend; "" for any other."""
    extra = EXTRAS.get(spec, "torch")
    remedy = f"pip install 'llama-parity[{extra}]' (or -e '.[{extra}]') brings what it needs"
    return remedy if spec in SHIPPED else ""


def _to_install(error: ModuleNotFoundError) -> str:
    return f"install {error.name}, which it needs, into this environment"


def _in_package(file: Path, path: str) -> str:
    """Return how a module with relative imports is named: by its package."""
    root, here = file.parent, Path.cwd()
    while (root / "__init__.py").is_file():
        root = root.parent
    if root == file.parent and root.is_relative_to(here):  # a package without that file
        root = here
    parts = file.relative_to(root).with_suffix("").parts
    if len(parts) == 1:
        return "it is no part of a package: write its imports without the leading dot"
    where = "" if root == here else f", in the folder {root}"
    return f"it is a part of a package: give {'.'.join(parts)}:{path}{where}"
