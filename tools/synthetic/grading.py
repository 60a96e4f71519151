"""Grade answers to synthetic prompts."""

import json
import math
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


def shares(records: Sequence[Record], answers: Sequence[str]) -> list[Share]:
    """Return the shares of right answers: of all, by kind, with an instruction on form, by turn."""
    graded = [(record, grade(record, said)) for record, said in zip(records, answers, strict=True)]
    groups = {"all": [value for _, value in graded]}
    for record, value in sorted(graded, key=lambda pair: str(pair[0]["kind"])):
        groups.setdefault(record["kind"], []).append(value)
    for record, value in sorted(graded, key=lambda pair: int(pair[0]["turn"])):
        if record["form"]:
            groups.setdefault(f"with a form to keep, turn {record['turn']}", []).append(value)
    return [_share(name, values) for name, values in groups.items()]


def _share(name: str, grades: list[float]) -> Share:
    n = len(grades)
    right, other = (grades.count(value) / n for value in (1.0, 0.5))
    return Share(name, n, right, other, math.sqrt(right * (1 - right) / n))
