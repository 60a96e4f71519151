"""Read prompts, for which a model's answers are drawn, and tokenise them by its chat template."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llama_common.errors import InputError
from llama_common.notes import note

from ..common.torchrun import is_main_process
from ..data.conversations import NEXT, UNSUPPORTED, as_messages, require_turns
from ..data.preferences import prompt_messages, true_or_false
from ..data.records import Record, records
from ..tokenizer.chat_template import ChatTemplate, Message

FLAG = "--prompts"
TOLD = ("tools", "functions")  # keys that a template would have to write
# Keys that are used, and those of the prompts of tools/tasks.py that say what is right.
KEYS = {"prompt", "messages", "safety", "answer", "content", "kind", "form", "turn"}


class Prompt(NamedTuple):
    """A conversation whose next message is the assistant's."""

    messages: list[Message]
    is_tagged: bool  # it may elicit unsafe answers: the paper's safety tag
    place: str  # of the record, for messages


class TokenisedPrompt(NamedTuple):
    """A prompt, and its token ids by the model's chat template."""

    prompt: Prompt
    ids: list[int]


def read_prompts(patterns: Sequence[str], flag: str = FLAG) -> Iterator[Prompt]:
    """Yield the prompts of the files, folders and globs that ``flag`` names.

    A record has ``prompt``, a text or a list of messages, or ``messages``; ``safety`` is its tag.
    Other keys are passed over, and a line on stderr names those that are not known. Raises
    InputError, with file and line, for a record without a prompt or with an answer to it, and
    for roles out of order.
    """
    passed_over: set[str] = set()
    for record in records(patterns, flag):
        passed_over |= record.content.keys() - KEYS
        yield _prompt(record)
    if passed_over and is_main_process():
        note(f"{flag}: keys passed over: {', '.join(sorted(passed_over))[:200]}")


def load_prompts(patterns: Sequence[str], flag: str = FLAG) -> list[Prompt]:
    """Return the prompts that ``read_prompts`` yields; InputError where there is none."""
    found = [*read_prompts(patterns, flag)]
    if not found:
        raise InputError(f"{flag}: holds no prompt; name files that do")
    return found


def tokenise(
    prompts: Sequence[Prompt],
    template: ChatTemplate,
    context: int,
    max_new_tokens: int,
    flag: str = FLAG,
) -> list[TokenisedPrompt]:
    """Return the prompts that leave room for ``max_new_tokens`` in the context, with their ids.

    Raises InputError, with the prompt's place, where the template fails, and where not one of
    ``flag`` fits.
    """
    whole = (TokenisedPrompt(prompt, prompt_ids(prompt, template)) for prompt in prompts)
    found = [prompt for prompt in whole if len(prompt.ids) + max_new_tokens <= context]
    if not found:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: the context of {context:,} tokens holds no prompt "
            f"of {flag} with so many new tokens; ask for fewer"
        )
    return found


def require_unanswered(messages: Sequence[Message], place: str) -> None:
    """Raise InputError unless the assistant's turn comes after the messages."""
    if not messages:
        raise InputError(f"{place} holds no message; remove the line")
    require_turns(messages, place)
    last = messages[-1]["role"]
    if "assistant" not in NEXT[last]:
        told = "an answer" if last == "assistant" else f"a message of role {last}"
        raise InputError(
            f"{place}: ends with {told}; a prompt ends with the user's message: remove what "
            "follows it, or the line"
        )


def prompt_ids(prompt: Prompt, template: ChatTemplate) -> list[int]:
    """Return a prompt's ids; InputError, with its place, where the template fails."""
    try:
        ids = template.encode(prompt.messages)
    except InputError as error:
        raise InputError(f"{prompt.place}: {error}") from None
    if not ids:
        raise InputError(f"{prompt.place}: {template.origin} writes nothing; choose another")
    return ids


def _prompt(record: Record) -> Prompt:
    content, place = record
    for key in TOLD:
        if content.get(key):
            raise InputError(
                f"{place}: {key} holds {UNSUPPORTED[key]}, which is not supported; remove the line"
            )
    given = [key for key in ("prompt", "messages") if key in content]
    if len(given) != 1:
        keys = ", ".join(map(repr, list(content)[:8])) or "no key"
        what = "both prompt and messages" if given else f"neither prompt nor messages, but {keys}"
        raise InputError(f"{place} holds {what}; give one of the two")
    if given == ["prompt"]:
        messages = prompt_messages(content["prompt"], f"{place}: prompt")
    else:
        messages = as_messages(content["messages"], "role", "content", f"{place}: messages")
    require_unanswered(messages, place)
    return Prompt(messages, bool(true_or_false(content, "safety", place)), place)
