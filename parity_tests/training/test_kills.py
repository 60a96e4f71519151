"""A run that is killed many times and resumed equals the uninterrupted one."""

import json
import random
from pathlib import Path

from hypothesis import settings

from ..support.jobs import Command, Job
from ..support.survival import SHAPE, require_same
from ..support.trainer_runs import TEXT

# Killed


def run_that_is_killed(folder: Path) -> Command:
    """Return the command of a run with many kills, and of the same run uninterrupted."""
    (folder / "text.txt").write_text(TEXT)
    kills = n_kills()
    rng = random.Random(kills)
    lives: list[dict[str, float]] = [{"touch": rng.randrange(1, 10)}]
    lives += [{"touch": rng.randrange(1, 60)} for _ in range(kills)]
    lives += [{"seconds": rng.uniform(0.01, 0.5)} for _ in range(kills // 4)]
    lives.insert(3, {"longest": 10_000})  # shorter than the export
    lives.insert(6, {"longest": 1_000_000})  # longer than the export, shorter than a checkpoint
    steps = 12 + kills
    plan = {
        "out": str(folder / "killed"),
        "whole": str(folder / "whole"),
        "flags": [*SHAPE, "--data", f"{folder}/text.txt", "--steps", str(steps), "--save-every=1"],
        "lives": lives,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return "-m", "parity_tests.workers.killed_trainer", folder / "plan.json"


KILLED = Job(run_that_is_killed)


def n_kills() -> int:
    return min(200, 2 * settings.default.max_examples // 7)


def test_a_run_killed_over_and_over_is_the_uninterrupted_one() -> None:
    done = KILLED.done()
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > n_kills() // 2
    assert "Traceback" not in done.stderr
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] * 2
    require_same(KILLED.folder / "whole", KILLED.folder / "killed")
