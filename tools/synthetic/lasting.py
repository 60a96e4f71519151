"""Measure over how many turns of a dialogue answers keep the form that was asked for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_common.errors import InputError
from llama_common.files import require_readable

from .tasks import FORMS, Form

BY_INSTRUCTION = {form.instruction: form for form in FORMS}


class Asked(NamedTuple):
    """The questions of a dialogue, their right answers without a form, and the form asked for."""

    form: Form
    questions: list[str]
    contents: list[str]


class TurnShare(NamedTuple):
    """The shares of a turn's answers that keep the form, and that are right as well."""

    turn: int
    number: int
    kept: float
    error: float  # standard error of ``kept``
    right: float


class Lasting(NamedTuple):
    """The mean number of turns before the first answer that breaks the form."""

    turns: float
    error: float  # standard error
    never_broken: float  # share of the dialogues whose answers all keep it


def read_dialogues(path: Path) -> list[Asked]:
    """Return the dialogues of a file of tools/tasks.py; InputError for a line that is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file; write it with python tools/tasks.py")
    require_readable(path)
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            said = [message["content"] for message in record["messages"]]
            roles = [message["role"] for message in record["messages"]]
            is_dialogue = roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) > 0
            is_dialogue = is_dialogue and all(isinstance(text, str) for text in said)
            form = BY_INSTRUCTION[record["form"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            is_dialogue = False
        if not is_dialogue:
            raise InputError(f"{path}:{number}: is no dialogue of tools/tasks.py")
        found.append(Asked(form, said[::2], said[1::2]))
    return found


def keeps(form: Form, answer: str) -> bool:
    """Return whether an answer has a form, and something in it."""
    said = answer.strip()
    is_long = len(said) > len(form.before) + len(form.after)
    return is_long and said.startswith(form.before) and said.endswith(form.after)


def by_turn(asked: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[TurnShare]:
    """Return the shares of each turn; ``answers`` of each dialogue in order, of the first turns."""
    found = []
    for turn in range(max(map(len, answers))):
        reached = [(a, own[turn]) for a, own in zip(asked, answers, strict=True) if own[turn:]]
        kept = [keeps(one.form, said) for one, said in reached]
        right = [said.strip() == one.form.applied(one.contents[turn]) for one, said in reached]
        n, share = len(kept), sum(kept) / len(kept)
        error = math.sqrt(share * (1 - share) / n)
        found.append(TurnShare(turn + 1, n, share, error, sum(right) / n))
    return found


def lasting(asked: Sequence[Asked], answers: Sequence[Sequence[str]]) -> Lasting:
    """Return how many turns the forms last, counting no turn after the first broken one."""
    lengths = []
    for one, own in zip(asked, answers, strict=True):
        kept = [keeps(one.form, said) for said in own]
        lengths.append(kept.index(False) if False in kept else len(kept))
    n, mean = len(lengths), sum(lengths) / len(lengths)
    variance = sum((length - mean) ** 2 for length in lengths) / max(1, n - 1)
    never = sum(length == len(own) for length, own in zip(lengths, answers, strict=True))
    return Lasting(mean, math.sqrt(variance / n), never / n)
