"""Read pairs of answers, of which one was preferred: messages, texts, or Anthropic's dialogues."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_common.errors import InputError, shown
from llama_common.notes import note

from ..common.torchrun import is_main_process
from ..tokenizer.chat_template import Message
from .conversations import as_messages, require_order, text_message
from .records import Record, records
from .text_files import DATA

# How much better the chosen answer was judged, and how data sets write that. The order is that of
# the margins.
STRENGTHS = "significantly better", "better", "slightly better", "negligibly better"
SPELLINGS: Mapping[str, int] = {
    **{name: i for i, name in enumerate(STRENGTHS)},
    **{name.removesuffix(" better"): i for i, name in enumerate(STRENGTHS)},
    **{"negligibly better / unsure": 3, "negligibly better/unsure": 3, "unsure": 3},
}
NOT_GIVEN = len(STRENGTHS)
KEYS = "prompt", "chosen", "rejected", "strength", "safety", "chosen_safe", "rejected_safe"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """Two conversations that begin alike, and end with the chosen and the rejected answer."""

    chosen: list[Message]
    rejected: list[Message]
    strength: int  # index into STRENGTHS, or NOT_GIVEN
    is_tagged: bool  # of the safety data
    is_safe: tuple[bool | None, bool | None]  # is the chosen, the rejected answer safe? None: ?
    place: str  # of the record, for messages


def read_pairs(patterns: Sequence[str], flag: str = DATA) -> Iterator[Pair]:
    """Yield the pairs of the files, folders and globs that ``flag`` names.

    Keys of a record that are not used are passed over, and a line on stderr names them. Raises
    InputError, with file and line, for a record that is no pair: keys that are missing, answers
    that are equal, conversations that do not begin alike, an unknown strength.
    """
    passed_over: set[str] = set()
    for record in records(patterns, flag):
        passed_over |= record.content.keys() - set(KEYS)
        yield _pair(record)
    if passed_over and is_main_process():
        note(f"{flag}: keys passed over: {', '.join(sorted(passed_over))[:200]}")


def _pair(record: Record) -> Pair:
    content, place = record
    missing = [key for key in ("chosen", "rejected") if key not in content]
    if missing:
        keys = ", ".join(map(repr, list(content)[:8])) or "no key"
        raise InputError(
            f"{place} holds no {' and no '.join(missing)} answer, but {keys}; name the preferred "
            "one 'chosen', the other 'rejected'"
        )
    prompt = prompt_messages(content["prompt"], f"{place}: prompt") if "prompt" in content else []
    sides = []
    for key in ("chosen", "rejected"):
        messages = prompt + _answer(content[key], f"{place}: {key}", bool(prompt))
        require_order(messages, f"{place}: {key}")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{place}: {key} does not end with an answer of the assistant; add it")
        sides.append(messages)
    chosen, rejected = sides
    if [_stripped(m) for m in chosen] == [_stripped(m) for m in rejected]:
        raise InputError(f"{place}: chosen and rejected are equal; remove the line")
    if chosen[0] != rejected[0]:
        raise InputError(
            f"{place}: chosen and rejected do not begin with the same message, so that they answer "
            "different prompts; correct the line"
        )
    safe = (
        true_or_false(content, "chosen_safe", place),
        true_or_false(content, "rejected_safe", place),
    )
    is_tagged = bool(true_or_false(content, "safety", place))
    return Pair(chosen, rejected, _strength(content, place), is_tagged, safe, place)


def _stripped(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def prompt_messages(given: Any, place: str) -> list[Message]:
    """Return a prompt's messages: those given, a dialogue's (Anthropic's), or a text as the user's.

    Raises InputError, naming ``place``, for what is none of them.
    """
    if not isinstance(given, str):
        return as_messages(given, "role", "content", place)
    messages = _dialogue(given) or [{"role": "user", "content": given}]
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # a dialogue's "Assistant:" opens the answer
    return [text_message(m["role"], m["content"], place) for m in messages]


def _answer(given: Any, place: str, has_prompt: bool) -> list[Message]:
    """Return an answer's messages; without a prompt they are a whole conversation."""
    if not isinstance(given, str):
        return as_messages(given, "role", "content", place)
    if has_prompt:
        return [text_message("assistant", given, place)]
    messages = _dialogue(given)
    if not messages:
        raise InputError(
            f"{place} is a text and there is no prompt; give one, or a dialogue that begins with "
            r"'\n\nHuman:'"
        )
    return [text_message(m["role"], m["content"], place) for m in messages]


def _dialogue(text: str) -> list[Message]:
    r"""Return the messages of Anthropic's form, ``\n\nHuman: ...\n\nAssistant: ...``, or []."""
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        return []
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": said.strip()} for speaker, said in pairs]


def _strength(content: Mapping[str, Any], place: str) -> int:
    given = content.get("strength")
    if given is None:
        return NOT_GIVEN
    found = SPELLINGS.get(" ".join(given.lower().split())) if isinstance(given, str) else None
    if found is None:
        raise InputError(
            f"{place}: strength is {shown(given)[:80]}, not one of {', '.join(STRENGTHS)}; correct "
            "it, or leave it out"
        )
    return found


def true_or_false(content: Mapping[str, Any], key: str, place: str) -> bool | None:
    """Return a record's flag, None where it has none; InputError for another value."""
    given = content.get(key)
    if given is not None and not isinstance(given, bool):
        raise InputError(f"{place}: {key} is {shown(given)[:80]}, not true or false; correct it")
    return given
