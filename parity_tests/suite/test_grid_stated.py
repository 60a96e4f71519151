"""Keys of config.json that a package leaves to its user are not counted as keys that it reads."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ..grid import running
from ..grid.cells import COLUMNS, State, cell
from ..grid.recorders import Recorder, read_recorder


def state(found: Any, title: str) -> State:
    return cell(found, next(one for one in COLUMNS if one.title == title), []).state


def test_a_key_that_the_user_states_is_not_covered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(running, "PORTS", "parity_tests.suite")
    reader = Recorder("toy_loaders", "A reader", ("numpy",), ("Reader",), stated=("rms_norm_eps",))
    found = running.run_recorder(reader, tmp_path, Path(sys.executable), "quick")
    assert state(found, "epsilon") is State.NOT_COVERED
    assert state(found, "base") is state(found, "loader") is State.PASSED


def test_the_stated_keys_are_read_from_the_ports_file(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text('REQUIRES = ("some==1.0",)\nSTATED = ("rope_", "hidden_act")\n')
    found = read_recorder(file)
    assert found is not None
    assert found.stated == ("rope_", "hidden_act")
