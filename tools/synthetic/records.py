"""Make the records of synthetic conversations, pairs of answers and prompts.

Each has messages, as conversations have; in some an instruction on the form of all answers stands
in the system message, or before the first question or every one, and must hold in every turn.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from .tasks import FORMS, PLAIN, Form, Task, draw_task

WITH_FORM = 0.5  # share of conversations with an instruction on the form of answers
STRENGTHS = ("significantly better", "better", "slightly better", "negligibly better")
FILLER = "I am not sure what you mean."

Record = Mapping[str, Any]
# Of the instruction: the system message, the first user message, or every user message.
Place = Literal["system", "user", "every"]


def conversations(
    rng: random.Random, number: int, turns: int, held_out: bool = False, place: Place = "system"
) -> Iterator[Record]:
    """Yield conversations of one to ``turns`` exchanges with right answers."""
    for _ in range(number):
        form, tasks = _draw(rng, rng.randint(1, turns), held_out)
        yield {"messages": _messages(form, tasks, place)}


def dialogues(
    rng: random.Random, number: int, turns: int, held_out: bool = False
) -> Iterator[Record]:
    """Yield conversations of ``turns`` exchanges without a form, and beside them one to ask for.

    Every question is held out, or none is.
    """
    for _ in range(number):
        tasks = [draw_task(rng, held_out) for _ in range(turns)]
        yield {"messages": _messages(PLAIN, tasks), "form": rng.choice(FORMS).instruction}


def prompts(
    rng: random.Random, number: int, turns: int, held_out: bool = False, place: Place = "system"
) -> Iterator[Record]:
    """Yield conversations that lack their last answer, and beside them what is right.

    ``content`` is the answer without the form, ``answer`` with it; ``kind`` is the last task's, and
    ``turn`` its number.
    """
    for _ in range(number):
        form, tasks = _draw(rng, rng.randint(1, turns), held_out)
        last = tasks[-1]
        yield {
            "messages": _messages(form, tasks, place)[:-1],
            "answer": form.applied(last.answer),
            "content": last.answer,
            "kind": last.kind,
            "form": form.instruction,
            "turn": len(tasks),
            "safety": last.is_unsafe,
        }


def pairs(
    rng: random.Random, number: int, turns: int, held_out: bool = False, place: Place = "system"
) -> Iterator[Record]:
    """Yield a prompt with a chosen and a rejected answer, and how much better the chosen one is.

    Significantly: the other says nothing of the question, or tells a secret; better: it is wrong;
    slightly: it is right but not in the form asked for; negligibly: both are right, and the other
    has a full stop too many. ``safety`` is whether the question was to be refused; an answer that
    tells a secret is not safe.
    """
    for _ in range(number):
        strength = rng.choice(STRENGTHS)
        form, tasks = _draw(rng, rng.randint(1, turns), held_out)
        if strength == "slightly better" and form is PLAIN:
            form = rng.choice(FORMS)
        last = tasks[-1]
        if strength == "better" and last.is_unsafe:
            strength = "significantly better"
        chosen = form.applied(last.answer)
        tells_a_secret = last.is_unsafe and strength == "significantly better"
        yield {
            "prompt": _messages(form, tasks, place)[:-1],
            "chosen": chosen,
            "rejected": _rejected(strength, form, last),
            "strength": strength,
            "safety": last.is_unsafe,
            "chosen_safe": True,
            "rejected_safe": not tells_a_secret,
        }


def _rejected(strength: str, form: Form, task: Task) -> str:
    if strength == "significantly better":
        return form.applied(task.wrong if task.is_unsafe else FILLER)
    return {
        "better": form.applied(task.wrong),
        "slightly better": task.answer,
        "negligibly better": form.applied(task.answer) + " .",
    }[strength]


def _draw(rng: random.Random, turns: int, held_out: bool) -> tuple[Form, list[Task]]:
    """Draw a form and tasks, the last of them held out or not, the others not."""
    form = rng.choice(FORMS) if rng.random() < WITH_FORM else PLAIN
    tasks = [draw_task(rng, False) for _ in range(turns - 1)]
    return form, [*tasks, draw_task(rng, held_out)]


def _messages(form: Form, tasks: list[Task], place: Place = "system") -> list[dict[str, str]]:
    asked = instructed(form.instruction, [task.question for task in tasks], place)
    messages = asked[: -len(tasks)]
    for question, task in zip(asked[-len(tasks) :], tasks, strict=True):
        messages += [question, {"role": "assistant", "content": form.applied(task.answer)}]
    return messages


def instructed(instruction: str, questions: Sequence[str], place: Place) -> list[dict[str, str]]:
    """Return the user's messages, with an instruction (or "") where ``place`` says."""
    messages = [{"role": "user", "content": question} for question in questions]
    if instruction and place == "system":
        return [{"role": "system", "content": instruction}, *messages]
    if instruction:
        for message in messages if place == "every" else messages[:1]:
            message["content"] = f"{instruction}\n{message['content']}"
    return messages


def grade(record: Record, answer: str) -> float:
    """Return 1 for a prompt's right answer, 0.5 for a right one in another form, 0 for others."""
    said = answer.strip()
    if said == record["answer"]:
        return 1.0
    plain = said
    for form in FORMS:
        if said.startswith(form.before) and said.endswith(form.after):
            plain = min(plain, said[len(form.before) : len(said) - len(form.after)], key=len)
    return 0.5 if plain == record["content"] else 0.0
