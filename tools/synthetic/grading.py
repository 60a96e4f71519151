"""Grade answers to synthetic prompts."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_common.errors import InputError
from llama_common.files import require_readable

from .records import Record, grade


class Share(NamedTuple):
    """The shares of answers that are right, and right but for their form."""

    questions: str
    number: int
    right: float
    other_form: float
    error: float  # standard error of ``right``
    reward: float | None = None  # mean of what a reward model gives the answers


def read_prompts(path: Path) -> list[Record]:
    """Return the prompts of a file; InputError for a line that is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file; write it with python tools/tasks.py")
    require_readable(path)
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            texts = (record["answer"], record["content"], record["kind"], record["form"])
            is_prompt = all(isinstance(text, str) for text in texts)
            is_prompt = is_prompt and isinstance(record["turn"], int)
            is_prompt = is_prompt and isinstance(record["messages"], list)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_prompt = False
        if not is_prompt:
            raise InputError(f"{path}:{number}: is no prompt of tools/tasks.py")
        found.append(record)
    return found


def shares(
    records: Sequence[Record], answers: Sequence[str], rewards: Sequence[float] | None = None
) -> list[Share]:
    """Return the shares of right answers: of all, by kind, with an instruction on form, by turn.

    ``rewards`` are a reward model's scores of the answers; None: there is none.
    """
    scored: Sequence[float | None] = rewards or [None] * len(records)
    graded = [
        (record, (grade(record, said), reward))
        for record, said, reward in zip(records, answers, scored, strict=True)
    ]
    groups: dict[str, list[tuple[float, float | None]]] = {"all": [value for _, value in graded]}
    for record, value in sorted(graded, key=lambda pair: str(pair[0]["kind"])):
        groups.setdefault(record["kind"], []).append(value)
    for record, value in sorted(graded, key=lambda pair: int(pair[0]["turn"])):
        if record["form"]:
            groups.setdefault(f"with a form to keep, turn {record['turn']}", []).append(value)
    return [_share(name, values) for name, values in groups.items()]


def _share(name: str, graded: Sequence[tuple[float, float | None]]) -> Share:
    n, grades = len(graded), [value for value, _ in graded]
    right, other = (grades.count(value) / n for value in (1.0, 0.5))
    rewards = [reward for _, reward in graded if reward is not None]
    mean = statistics.fmean(rewards) if rewards else None
    return Share(name, n, right, other, math.sqrt(right * (1 - right) / n), mean)
