"""The folder of a round of rejection sampling: what is drawn, line by line, and what is kept.

samples.jsonl is whole or absent. Until it is, what is drawn stands in samples.part.jsonl, whose
lines are each a prompt with all of its answers, so that an interrupted round can go on.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import InputError, flag_of
from llama_common.files import atomic_write, open_lock, read_json, try_lock, write_text

from ..data.conversations import as_messages
from ..tokenizer.chat_template import Message
from .prompts import Prompt, require_unanswered

SAMPLES, PART, SETTINGS, LOCK = "samples.jsonl", "samples.part.jsonl", "rejection.json", "lock"
CONVERSATIONS = "conversations.jsonl"


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt, and its scores."""

    answer: str
    ended: bool  # by an end token
    ids: tuple[int, ...]  # the tokens drawn
    reward: float
    helpful: float
    safe: float | None  # None without a safety model


class Sampled(NamedTuple):
    """A prompt with all answers that a round drew to it."""

    prompt: Prompt
    samples: list[Sample]

    def line(self) -> str:
        """Return it as a line of samples.jsonl."""
        record = {"messages": self.prompt.messages, "safety": self.prompt.is_tagged}
        samples = [asdict(sample) for sample in self.samples]
        return json.dumps(record | {"samples": samples}, ensure_ascii=False) + "\n"


def key_of(messages: Sequence[Message]) -> str:
    """Return a text that two prompts share where their messages are the same."""
    return json.dumps([[message["role"], message["content"]] for message in messages])


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a folder's lock; InputError where another process has it."""
    handle = open_lock(out / LOCK)
    try:
        if not try_lock(handle):
            raise InputError(f"--out {out}: another process writes there; wait, or end it")
        yield
    finally:
        os.close(handle)


def begin(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a round, or with ``resume`` require that it was begun with ``settings``.

    Raises InputError for a folder that is there, or with ``resume`` is not, and for a setting that
    was another.
    """
    path = out / SETTINGS
    if not resume:
        if out.exists():
            raise InputError(
                f"--out {out}: is there already; name a new folder, or give --resume to continue "
                "what was interrupted there"
            )
        try:
            out.mkdir(parents=True)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"--out {out} cannot be written ({error}); choose another") from None
        return
    if not path.is_file():
        raise InputError(f"--resume: {out} holds no {SETTINGS}; leave --resume out to begin there")
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            was = "" if name == "prompts" else f", {json.dumps(before.get(name))[:200]},"
            raise InputError(
                f"{flag_of(name)}: was another{was} when {out} was begun; give that again, or name "
                "another --out"
            )


def read_part(out: Path) -> list[Sampled]:
    """Return what an interrupted round has drawn, and cut off a line that is not whole."""
    if (out / SAMPLES).is_file():
        return read_samples(out)
    part = out / PART
    if not part.is_file():
        return []
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with part.open("r+b") as file:
            file.truncate(len(whole))
    return list(_parsed(whole, part))


def read_samples(folder: Path, flag: str = "--out") -> list[Sampled]:
    """Return all that a finished round drew; InputError for a folder without it, or other lines."""
    path = folder / SAMPLES
    if not path.is_file():
        raise InputError(
            f"{flag} {folder}: holds no {SAMPLES}, which a finished round of rejection sampling "
            "has; name such a folder"
        )
    if found := list(_parsed(path.read_bytes(), path)):
        return found
    raise InputError(f"{flag} {path}: is empty; copy the file again, or name another folder")


def _parsed(content: bytes, path: Path) -> Iterator[Sampled]:
    for number, line in enumerate(content.splitlines(), 1):
        place = f"{path}: line {number}"
        try:
            record = json.loads(line)
            messages = as_messages(record["messages"], "role", "content", place)
            require_unanswered(messages, place)
            samples = [Sample(**one | {"ids": tuple(one["ids"])}) for one in record["samples"]]
            is_whole = bool(samples) and all(map(_is_sample, samples))
            is_whole = is_whole and isinstance(record["safety"], bool)
            prompt = Prompt(messages, record["safety"], place)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise InputError(f"{place} is none that rejection sampling wrote; copy the file again")
        yield Sampled(prompt, samples)


def _is_sample(sample: Sample) -> bool:
    scores = (sample.reward, sample.helpful, 0.0 if sample.safe is None else sample.safe)
    return (
        isinstance(sample.answer, str)
        and isinstance(sample.ended, bool)
        and all(type(id_) is int and id_ >= 0 for id_ in sample.ids)
        and all(isinstance(score, float) and math.isfinite(score) for score in scores)
    )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines, which is whole or absent."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)

    atomic_write(path, write)


def conversation_line(messages: Sequence[Message], answer: str) -> str:
    """Return a conversation as a line that fine-tuning reads."""
    whole = [*messages, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": whole}, ensure_ascii=False) + "\n"
