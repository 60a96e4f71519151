"""Dialogues with an instruction: where it stands while answers are drawn, and in what is learnt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from ..tokenizer.chat_template import Message

# Where the instruction stands in what is learnt. Llama 2's form writes a system message inside the
# first user message.
Place = Literal["system", "user"]
BREAK = "\n"  # between an instruction and the user's text


class Draft(NamedTuple):
    """A dialogue whose answers are to be drawn."""

    number: int  # of all; with the seed it decides what is drawn
    instruction: str  # that the answers are drawn with
    learnt: str  # the instruction as it stands in what is learnt: the same, or terser
    questions: list[str]


class Dialogue(NamedTuple):
    """A draft with the answers to its questions that have been drawn."""

    draft: Draft
    answers: list[str]


def messages_of(
    instruction: str,
    questions: Sequence[str],
    answers: Sequence[str],
    place: Place,
    is_everywhere: bool,
) -> "list[Message]":
    """Return a dialogue's messages up to the first question that has no answer.

    The instruction stands in the system message or the first user message, and, if it is to be
    everywhere, in every later user message.
    """
    system: list[Message] = [{"role": "system", "content": instruction}]
    messages = system if place == "system" else []
    for turn, question in enumerate(questions[: len(answers) + 1]):
        is_told = is_everywhere if turn else place == "user"
        text = f"{instruction}{BREAK}{question}" if is_told else question
        messages.append({"role": "user", "content": text})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages
