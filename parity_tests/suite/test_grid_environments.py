"""The environments of the grid's packages: what is installed, and how."""

import sys
from pathlib import Path

import pytest

from ..grid import environments
from ..grid.markdown import version_of
from ..grid.recorders import Recorder

NODE = Recorder("toy", "A toy", ("toy==1.0",), ("Port",), npm=("@a/toy@2.0", "other@3.0"))


def test_npm_packages_are_installed_into_the_environment_without_running_their_scripts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def call(command: list[str]) -> None:
        calls.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(environments, "_call", call)
    folder = environments.environment(NODE, tmp_path)
    (npm,) = [command for command in calls if command[0] == "npm"]
    assert npm[1] == "install"
    assert "--ignore-scripts" in npm
    assert "--silent" not in npm  # which hides why a package is not installed
    assert npm[-4:] == ["--prefix", str(folder), "@a/toy@2.0", "other@3.0"]


def test_a_row_of_an_npm_package_has_its_own_version_not_that_of_its_helper_of_pip() -> None:
    helped = Recorder("toy", "A toy", ("pytest==9.2.0",), ("Port",), npm=("@a/toy@2.0",))
    versions = environments.installed(Path(sys.executable), helped)
    assert version_of({"versions": versions}) == "2.0"
    assert "pytest" in versions


def test_without_npm_its_packages_are_not_installed_and_no_environment_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = environments._call

    def call(command: list[str]) -> None:
        if "venv" in command:
            Path(command[-1]).mkdir()
        elif command[0] == "npm":
            run(["an-npm-that-is-not-there", *command[1:]])

    monkeypatch.setattr(environments, "_call", call)
    with pytest.raises(environments.InstallError, match="there is no an-npm-that-is-not-there on"):
        environments.environment(NODE, tmp_path)
    assert not list(tmp_path.iterdir())
