"""Ghost Attention (Llama 2, section 3.3): dialogues that teach an instruction to last.

The instruction is put to every user message while a model's answers are drawn. What is learnt is
the last of them, in the same dialogue with the instruction in its beginning alone.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_common.errors import InputError

from ..data.conversations import WEIGHT, as_messages, split_weights
from ..data.preferences import prompt_messages
from ..data.records import Record, records
from ..inference.config import SamplingConfig
from ..tokenizer.chat_template import Message
from .dialogues import Dialogue, Draft, Place, messages_of
from .instructions import Instruction, draw_instruction

if TYPE_CHECKING:
    from ..inference.text_model import TextModel  # imports torch

PROMPTS = "--prompts"


def read_questions(patterns: Sequence[str]) -> list[list[str]]:
    """Return the user's messages of each record of the files that ``--prompts`` names.

    A record holds ``messages``, ShareGPT's ``conversations``, or ``prompt``, a text, a dialogue or
    messages; all else of it is passed over. Raises InputError, with file and line, for one without
    a message of the user's, and where there is no record.
    """
    found = [_questions(record) for record in records(patterns, PROMPTS)]
    if not found:
        raise InputError(f"{PROMPTS}: holds no conversation; name files that do")
    return found


def _questions(record: Record) -> list[str]:
    place = record.place
    content, _ = split_weights(record)
    if "messages" in content:
        messages = as_messages(content["messages"], "role", "content", place)
    elif "conversations" in content:
        messages = as_messages(content["conversations"], "from", "value", place)
    elif "prompt" in content:
        messages = prompt_messages(content["prompt"], f"{place}: prompt")
    else:
        keys = ", ".join(map(repr, list(content)[:8])) or "no key"
        raise InputError(f"{place} holds no messages, conversations or prompt, but {keys}")
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise InputError(f"{place}: holds no message of the user's; remove the line")
    return questions


def of_length(questions: Sequence[Sequence[str]], turns: int) -> list[list[str]]:
    """Return dialogues of ``turns`` questions: longer ones are cut, shorter ones are joined.

    What does not fill a last dialogue is left out. 0 = as they are.
    """
    if not turns:
        return [list(own) for own in questions]
    found: list[list[str]] = [[]]
    for own in questions:
        found[-1] += own[: turns - len(found[-1])]
        if len(found[-1]) == turns:
            found.append([])
    return found[:-1]


def drafts(
    questions: Sequence[list[str]], instructions: Sequence[Instruction], combine: int, seed: int
) -> list[Draft]:
    """Return a draft for each dialogue's questions, with 1 to ``combine`` instructions drawn."""
    found = []
    for number, own in enumerate(questions):
        rng = random.Random(f"{seed} {number}")
        found.append(Draft(number, *draw_instruction(rng, instructions, combine), own))
    return found


def taught(dialogue: Dialogue, place: Place) -> dict[str, list[dict[str, object]]]:
    """Return the record that ``sft`` learns from: the last answer alone has weight 1.

    The loss is 0 "for all the tokens from the previous turns, including assistant messages".
    """
    draft, answers = dialogue
    messages = messages_of(draft.learnt, draft.questions, answers, place, False)
    weighed: list[dict[str, object]] = [dict(message) for message in messages]
    for message in weighed:
        if message["role"] == "assistant":
            message[WEIGHT] = 0
    weighed[-1][WEIGHT] = 1
    return {"messages": weighed}


class Sampler:
    """Draws the answers of dialogues turn by turn, many dialogues at a time.

    ``dropped`` counts the dialogues that are given up, by the reason.
    """

    def __init__(self, model: "TextModel", settings: SamplingConfig, place: Place) -> None:
        self.model, self.settings, self.place = model, settings, place
        self.dropped: Counter[str] = Counter()

    def sample(self, given: Sequence[Draft], rows: int) -> Iterator[list[Dialogue]]:
        """Yield the dialogues that are left after each turn, at last those with all answers.

        ``rows`` answers are drawn at once.
        """
        going_on = [Dialogue(draft, []) for draft in given]
        for turn in range(max(len(draft.questions) for draft in given)):
            whole = [d for d in going_on if len(d.draft.questions) <= turn]
            going_on = [d for d in going_on if len(d.draft.questions) > turn]
            going_on = sorted(whole + self._answer(going_on, rows), key=lambda d: d.draft.number)
            yield going_on

    def _answer(self, dialogues: Sequence[Dialogue], rows: int) -> list[Dialogue]:
        """Add an answer to each dialogue; return those that are not given up."""
        from .answers import sample_seed  # imports torch

        asked = [(dialogue, self._prompt(dialogue)) for dialogue in dialogues]
        fitting = [(dialogue, messages) for dialogue, messages in asked if messages]
        settings = [
            replace(
                self.settings,
                seed=sample_seed(self.settings.seed, d.draft.number, len(d.answers)),
            )
            for d, _ in fitting
        ]
        said = self.model.chat_batch([m for _, m in fitting], settings, max_rows=rows)
        going_on = []
        for (dialogue, _), answer in zip(fitting, said, strict=True):
            text = answer.text.strip()
            if answer.finish_reason == "length":
                self.dropped["an answer does not end within --max-new-tokens"] += 1
            elif not text:
                self.dropped["an answer is empty"] += 1
            else:
                dialogue.answers.append(text)
                going_on.append(dialogue)
        return going_on

    def _prompt(self, dialogue: Dialogue) -> list[Message]:
        """Return the messages of the next prompt, [] where the dialogue is given up."""
        draft, answers = dialogue
        messages = messages_of(draft.instruction, draft.questions, answers, self.place, True)
        try:
            n = len(self.model.chat_template.encode(messages))
        except InputError as error:
            if not answers:  # an answer of the model's own is not the user's mistake
                raise
            self.dropped[str(error)] += 1
            return []
        if n < self.model.model.config.max_seq_len:
            return messages
        self.dropped["it is longer than the context"] += 1
        return []
