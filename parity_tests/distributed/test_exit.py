"""How a process of a job ends."""

import os
import time

import pytest

from llama_torch.common.torchrun import MAIN_FIRST, exit_process


@pytest.mark.parametrize(
    ("rank", "code", "waited"), [(0, 2, []), (1, 2, [MAIN_FIRST]), (1, 0, []), (0, 0, [])]
)
def test_a_process_that_fails_lets_the_main_one_print_first(
    rank: int, code: int, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun would end the main process with it, before a word is printed."""
    sleeps: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(time, "sleep", sleeps.append)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as ended:
        exit_process(lambda: code)
    assert (ended.value.code, sleeps) == (code, waited)
