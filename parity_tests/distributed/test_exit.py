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


@pytest.mark.parametrize(
    ("world", "code", "restarts", "said"),
    [
        (2, 0, (0, 0), ""),
        (2, 143, (0, 0), "note: exit code 143, which torchrun reports with a traceback of its own"),
        (2, 2, (3, 3), "note: exit code 2, which torchrun reports with a traceback of its own"),
        (
            2,
            2,
            (1, 3),
            "note: exit code 2, after which torchrun starts the job again, unless it was stopped",
        ),
        (1, 2, (0, 0), "note: exit code 2, which torchrun reports with a traceback of its own"),
        (1, 2, None, ""),
    ],
)
def test_what_torchrun_does_after_an_exit_is_announced(
    world: int,
    code: int,
    restarts: tuple[int, int] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its traceback would look like a fault of a run that was stopped, or of a wrong flag."""
    for rank in range(world):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if restarts is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts[0]))
            monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts[1]))
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit) as ended:
            exit_process(lambda: code)
        assert (ended.value.code or 0) == code
        error = capsys.readouterr().err
        assert error.startswith(said if rank == 0 else "")
        assert error.count("\n") == (1 if said and rank == 0 else 0)
