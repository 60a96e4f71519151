"""An environment of its own for each port: a venv with the pinned packages and the suite's own."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from llama_common.errors import InputError
from llama_common.files import remove

from .recorders import Recorder

# What the suite itself needs. The versions of the two that choose the examples are pinned.
SUITE = (
    *("hypothesis==6.170.15", "pytest==9.2.0"),
    *("numpy", "ml_dtypes", "safetensors", "rich", "tyro"),
)

# Scripts of packages fetch what no pin holds: CUDA libraries, another build. No port needs any.
NPM_INSTALL = ("install", "--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts")


class InstallError(Exception):
    """The packages of a port could not be installed; the message is the installer's last line."""


def environment(recorder: Recorder, cache: Path) -> Path:
    """Return the folder of a port's environment, made where it is not there.

    Its name carries a hash of what is installed. Raises InstallError.
    """
    wanted = json.dumps([recorder.requires, recorder.npm, SUITE, sys.version_info[:2]])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = cache / f"{recorder.name}-{digest}"
    if not (folder / "complete").exists():
        if folder.exists():
            raise InputError(f"{folder}: an environment that is not complete; remove it")
        _make(recorder, folder)
    return folder


def _make(recorder: Recorder, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", str(folder)])
    try:
        _call([str(python_of(folder)), "-m", "pip", "install", "-q", *recorder.requires, *SUITE])
        if recorder.npm:
            _call(["npm", *NPM_INSTALL, "--prefix", str(folder), *recorder.npm])
    except InstallError:
        remove(folder)
        raise
    (folder / "complete").touch()


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InstallError(f"there is no {command[0]} on this machine; install it") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        raise InstallError((errors or lines or ["no word"])[-1])


def python_of(folder: Path) -> Path:
    """Return the Python of an environment."""
    return folder / "bin" / "python"


def installed(python: Path, recorder: Recorder) -> dict[str, str]:
    """Return the versions of a port's packages in an environment, its own first: those of npm."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = {one["name"].lower().replace("_", "-"): one for one in json.loads(listed.stdout)}
    names = [_name(one) for one in (*recorder.requires, "numpy", "hypothesis", "pytest")]
    found = {name: versions[name]["version"] for name in names if name in versions}
    return {one.rpartition("@")[0]: one.rpartition("@")[2] for one in recorder.npm} | found


def _name(requirement: str) -> str:
    """Return the package of a pinned requirement, as ``mlx`` of ``mlx[cpu]==0.32.4``."""
    name = requirement.partition("==")[0].partition("@")[0].partition("[")[0]
    return name.strip().lower().replace("_", "-")
