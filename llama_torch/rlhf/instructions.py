"""Read instructions that are to last over a dialogue, and combine them (Llama 2, section 3.3)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_common.errors import InputError, has_surrogates, shown

from ..data.records import Record, records

FLAG = "--instructions"
KEYS = "instruction", "short"
LONGEST = 1 << 26  # bytes of a text file of instructions


class Instruction(NamedTuple):
    """An instruction as answers are drawn with it, and a terser one that is learnt in its place."""

    text: str
    short: str  # "" where there is none


def read_instructions(name: str) -> list[Instruction]:
    """Return the instructions of a text file, one a line, or of the records of a .jsonl file.

    A record has ``instruction``, and may have ``short``. Raises InputError, with file and line, for
    what is none, and for a file without one.
    """
    path = Path(name)
    if ".jsonl" in path.suffixes or path.suffix == ".parquet":
        found = [_instruction(record) for record in records([name], FLAG)]
    else:
        found = [Instruction(line.strip(), "") for line in _lines(path) if line.strip()]
    if not found:
        raise InputError(f"{FLAG} {name}: holds no instruction; write one a line")
    return found


def draw_instruction(
    rng: random.Random, instructions: Sequence[Instruction], most: int
) -> tuple[str, str]:
    """Return 1 to ``most`` different instructions, drawn and joined: to draw with, and to learn.

    The second is the first, or half of the time that with the terser form of those that have one:
    the paper modifies "the original instruction half of the time to be less verbose".
    """
    parts = rng.sample(instructions, rng.randint(1, min(most, len(instructions))))
    is_short = rng.random() < 0.5
    text = " ".join(part.text for part in parts)
    return text, " ".join(part.short or part.text for part in parts) if is_short else text


def _instruction(record: Record) -> Instruction:
    content, place = record
    if unknown := [key for key in content if key not in KEYS]:
        raise InputError(
            f"{place}: key {unknown[0]!r} is not known; an instruction has {' and '.join(KEYS)}"
        )
    text, short = (_text(content.get(key, ""), f"{place}: {key}") for key in KEYS)
    if not text:
        raise InputError(f"{place}: instruction is missing or empty; correct the line")
    return Instruction(text, short)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or has_surrogates(value):
        raise InputError(f"{where} is {shown(value)[:80]}, no text; correct the line")
    return value.strip()


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"longer than {LONGEST:,} bytes")
        return text.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{FLAG} {path}: cannot be read ({error}); give a text file with one a line"
        ) from None
