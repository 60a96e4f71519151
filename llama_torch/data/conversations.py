"""Read conversations in the forms that people have: messages, prompt and completion, ShareGPT's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_common.errors import InputError, has_surrogates, shown
from llama_common.notes import note

from ..common.torchrun import is_main_process
from ..tokenizer.chat_template import Message
from .records import Record, records
from .text_files import DATA

FORMS = "messages, conversations (ShareGPT's), or prompt and completion"
# Of a record beside its messages: what a template would have to write, and pairs of answers.
UNSUPPORTED = {
    "tools": "a list of tools",
    "functions": "a list of functions",
    "chosen": "a pair of answers, which a reward model learns from",
    "rejected": "a pair of answers, which a reward model learns from",
}
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant"},
    **{"assistant": "assistant", "tool": "tool", "observation": "tool"},
}
MESSAGE_KEYS = ("role", "content", "from", "value")  # of a message, in one form or another
# Role -> the roles that may follow it; "" is the beginning.
NEXT: Mapping[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


WEIGHT = "weight"  # of an answer: 0 or 1, as OpenAI's files have it; without it, 1


class Conversation(NamedTuple):
    """Messages in an order that a model can be trained on; the last is an answer to learn."""

    messages: list[Message]
    learnt: list[bool]  # of each answer of the assistant's, in order
    place: str  # of the record, for messages

    @property
    def first_prompt(self) -> list[Message]:
        """The messages before the first answer that is learnt."""
        return self.messages[: learnt_answers(self.messages, self.learnt)[0]]


def learnt_answers(messages: Sequence[Message], learnt: Sequence[bool] | None = None) -> list[int]:
    """Return the places of the answers that are learnt; ``learnt`` of each answer, None: all."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers if learnt is None else [i for i, is_ in zip(answers, learnt, strict=True) if is_]


def read_conversations(patterns: Sequence[str], flag: str = DATA) -> Iterator[Conversation]:
    """Yield the conversations of the files, folders and globs that ``flag`` names.

    What follows a conversation's last answer that is learnt is left out. Keys of a record that are
    no part of a form are passed over, and a line on stderr names them. Raises InputError, with file
    and line, for a record of no form, roles out of order, an empty message, a weight that is
    neither 0 nor 1, and for a record without an answer to learn.
    """
    passed_over: set[str] = set()
    for record in records(patterns, flag):
        content, learnt = split_weights(record)
        messages, unused = _messages(Record(content, record.place))
        passed_over |= unused
        require_order(messages, record.place)
        yield _up_to_learnt(messages, learnt, record.place)
    if passed_over and is_main_process():
        note(f"{flag}: keys passed over: {', '.join(sorted(passed_over))[:200]}")


def split_weights(record: Record) -> tuple[dict[str, Any], list[bool]]:
    """Return a record without its answers' weights, and whether each answer is learnt."""
    content, learnt = dict(record.content), []
    for form, role_key in (("messages", "role"), ("conversations", "from")):
        items = content.get(form)
        if not isinstance(items, list):
            continue
        content[form] = [_without_weight(item) for item in items]
        for number, item in enumerate(items, 1):
            if isinstance(item, dict):
                weight = _weight(item, role_key, f"{record.place}: message {number}")
                learnt += [] if weight is None else [weight]
        break
    return content, learnt or [True]


def _without_weight(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: value for key, value in item.items() if key != WEIGHT}


def _weight(item: Mapping[str, Any], role_key: str, where: str) -> bool | None:
    """Return whether a message is learnt; None for one that is no answer."""
    role, weight = item.get(role_key), item.get(WEIGHT)
    is_answer = isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"
    if weight is None:
        return True if is_answer else None
    if not is_answer:
        raise InputError(
            f"{where}: has a {WEIGHT}, which answers alone have: no other message is learnt; "
            "remove it"
        )
    # JSON's true is 1 in Python; a column of a table may hold 1.0.
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(
            f"{where}: {WEIGHT} is {shown(weight)[:80]}, neither 0 (not learnt) nor 1; correct it"
        )
    return bool(weight)


def _up_to_learnt(messages: list[Message], learnt: list[bool], place: str) -> Conversation:
    """Return the conversation up to its last answer that is learnt; InputError where none is."""
    answers = learnt_answers(messages, learnt)
    if not answers:
        raise InputError(
            f"{place}: every answer has {WEIGHT} 0, so that there is nothing to learn; give one "
            f"{WEIGHT} 1, or remove the line"
        )
    kept = messages[: answers[-1] + 1]
    return Conversation(kept, learnt[: len(learnt_answers(kept))], place)


def _messages(record: Record) -> tuple[list[Message], set[str]]:
    """Return a record's messages, and the keys that are no part of them."""
    content, place = record
    for key in UNSUPPORTED:
        if content.get(key):
            raise InputError(
                f"{place}: {key} holds {UNSUPPORTED[key]}, which is not supported; remove the line"
            )
    if "messages" in content:
        return as_messages(content["messages"], "role", "content", place), content.keys() - {
            "messages"
        }
    if "conversations" in content:
        turns = as_messages(content["conversations"], "from", "value", place)
        if content.get("system"):
            turns.insert(0, text_message("system", content["system"], f"{place}: system"))
        return turns, content.keys() - {"conversations", "system"}
    if "prompt" in content and "completion" in content:
        pair = {"user": "prompt", "assistant": "completion"}
        messages = [text_message(r, content[key], f"{place}: {key}") for r, key in pair.items()]
        return messages, content.keys() - {"prompt", "completion"}
    keys = ", ".join(map(repr, list(content)[:8])) or "no key"
    raise InputError(f"{place} holds no {FORMS}, but {keys}; rename its keys")


def as_messages(given: Any, role_key: str, text_key: str, place: str) -> list[Message]:
    """Return the messages of a list of objects with a role and a text each."""
    if not isinstance(given, list) or not given:
        raise InputError(f"{place} is not a list with a message in it; remove or correct the line")
    messages = []
    for number, item in enumerate(given, 1):
        where = f"{place}: message {number}"
        if not isinstance(item, dict):
            raise InputError(f"{where} is no object with {role_key!r} and {text_key!r}; correct it")
        unknown = [k for k, v in item.items() if k not in (role_key, text_key) and v is not None]
        if other := [key for key in unknown if key in MESSAGE_KEYS]:
            raise InputError(
                f"{where}: {' and '.join(map(repr, other))} are the keys of another form; here "
                f"they are {role_key!r} and {text_key!r}: rename them"
            )
        if unknown:
            raise InputError(
                f"{where}: key {unknown[0]!r} is not known, and what it changes would be lost; "
                "remove it"
            )
        role = item.get(role_key)
        known = SHAREGPT_ROLES if role_key == "from" else {role: role for role in NEXT if role}
        if not isinstance(role, str) or role not in known:
            raise InputError(
                f"{where}: {role_key} is {shown(role)[:80]}, not one of {', '.join(known)}; "
                "correct it"
            )
        if known[role] == "system" and item.get(text_key) == "":
            continue  # as some files have where there is no system message
        messages.append(text_message(known[role], item.get(text_key), where))
    return messages


def text_message(role: str, text: Any, where: str) -> Message:
    """Return a message of a text; InputError, naming ``where``, for what is none, or empty."""
    if not isinstance(text, str) or has_surrogates(text):
        kind = type(text).__name__ if not isinstance(text, str) else "text with half a character"
        raise InputError(f"{where} has content of type {kind}; give valid text")
    if not text.strip():
        raise InputError(f"{where} is empty; fill it, or remove the line")
    return {"role": role, "content": text}


def require_order(messages: Sequence[Message], place: str) -> None:
    """Raise InputError for roles that no conversation has in this order, or without an answer."""
    require_turns(messages, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{place}: holds no answer of the assistant; remove the line")


def require_turns(messages: Sequence[Message], place: str) -> None:
    """Raise InputError for roles that no conversation has in this order."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in NEXT[before]:
            raise InputError(
                f"{place}: message {number} is of role {role}, "
                f"{f'after one of {before}' if before else 'the first'}; there must come "
                f"{' or '.join(NEXT[before])}"
            )
        before = role
