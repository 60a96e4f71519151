"""An environment of its own for each port: a venv with the pinned packages and the suite's own."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llama_common.errors import printable
from llama_common.files import open_lock, remove

from .recorders import Recorder

# What the suite itself needs. The versions of the two that choose the examples are pinned.
SUITE = (
    *("hypothesis==6.170.15", "pytest==9.2.0"),
    *("numpy", "ml_dtypes", "safetensors", "rich", "tyro"),
)

# Scripts of packages fetch what no pin holds: CUDA libraries, another build. No port needs any.
NPM_INSTALL = ("install", "--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts")


_LOCKS: set[int] = set()  # descriptors that the installers hold too, so that one outlives a kill

# Asked of an environment's own Python, which need not have pip.
VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.name: d.version for d in m.distributions() if d.name}))"
)


class InstallError(Exception):
    """A port cannot be run here: its packages, or a device that it needs, are not there."""


def environment(recorder: Recorder, cache: Path) -> Path:
    """Return the folder of a port's environment, made where it is not there.

    Its name carries a hash of what is installed. What a run that was killed left is removed first;
    one that another run makes now is waited for. Raises InstallError.
    """
    wanted = json.dumps([recorder.requires, recorder.npm, SUITE, sys.version_info[:2]])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    # The suite runs in a folder of its own, where a relative path would be another.
    folder = cache.absolute() / f"{recorder.name}-{digest}"
    if not (folder / "complete").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{folder.name}.lock")):
            if not (folder / "complete").exists():
                _make(recorder, folder)
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock, a file that is there meanwhile; wait for whoever holds it."""
    handle = open_lock(path)
    fcntl.flock(handle, fcntl.LOCK_EX)
    while not (path.exists() and path.stat().st_ino == os.fstat(handle).st_ino):
        os.close(handle)  # of one that the last holder removed
        handle = open_lock(path)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        _LOCKS.add(handle)
        yield
    finally:
        _LOCKS.discard(handle)
        path.unlink(missing_ok=True)
        os.close(handle)


def _make(recorder: Recorder, folder: Path) -> None:
    remove(folder)
    try:
        _call([sys.executable, "-m", "venv", str(folder)])
        _call([str(python_of(folder)), "-m", "pip", "install", "-q", *recorder.requires, *SUITE])
        if recorder.npm:
            _call(["npm", *NPM_INSTALL, "--prefix", str(folder), *recorder.npm])
    except BaseException:
        remove(folder)
        raise
    (folder / "complete").touch()


def _call(command: list[str]) -> None:
    """Run an installer; InstallError has its last line that speaks of an error."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, pass_fds=tuple(_LOCKS)
        )
    except FileNotFoundError:
        raise InstallError(f"there is no {command[0]} on this machine; install it") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        raise InstallError(printable((errors or lines or ["no word"])[-1], 300))


def python_of(folder: Path) -> Path:
    """Return the Python of an environment."""
    return folder / "bin" / "python"


def installed(python: Path, recorder: Recorder) -> dict[str, str]:
    """Return the versions of a port's packages in an environment, its own first: those of npm.

    Raises InstallError where one is not there, or in another version than the port pins.
    """
    listed = subprocess.run(
        [str(python), "-c", VERSIONS], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise InstallError(f"{python}: does not list its packages")
    versions = {_normal(name): version for name, version in json.loads(listed.stdout).items()}
    for requirement in recorder.requires:
        found, pinned = versions.get(_name(requirement)), _pin(requirement)
        if found is None or (pinned and found.partition("+")[0] != pinned):
            has = f"has {_name(requirement)} {found}" if found else f"lacks {_name(requirement)}"
            raise InstallError(f"{python}: {has}; the port is of {requirement}")
    names = [_name(one) for one in (*recorder.requires, "numpy", "hypothesis", "pytest")]
    own = {one.rpartition("@")[0]: one.rpartition("@")[2] for one in recorder.npm}
    return own | {name: versions[name] for name in names if name in versions}


def _name(requirement: str) -> str:
    """Return the package of a pinned requirement, as ``mlx`` of ``mlx[cpu]==0.32.4``."""
    return _normal(re.split(r"[\[<>=!~@; ]", requirement.strip(), maxsplit=1)[0])


def _pin(requirement: str) -> str:
    """Return the version that a requirement pins, without its local part, or ""."""
    return requirement.partition("==")[2].partition(";")[0].partition("+")[0].strip()


def _normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
