"""Find the assistant's answers in the token ids of a conversation: what fine-tuning learns.

A chat template is a program, and says nowhere what it writes for whom. So it is run on the
conversation up to each answer, as it is before an answer is generated, and after it; the answer is
what the second has more. All is compared in tokens: a border inside a token would train on a prompt
that generation never sees.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from llama_common.errors import InputError

from .chat_template import ChatTemplate, Message
from .tokenizer import Tokenizer

SHOWN = 30  # characters of a template's text in a message


class Segment(NamedTuple):
    """Consecutive tokens of a conversation, all of them learnt or none."""

    ids: list[int]
    learnt: bool  # an answer with its end token; the prompt that opens it is in the one before


def answer_segments(
    template: ChatTemplate, messages: Sequence[Message], learnt: Sequence[bool] | None = None
) -> list[Segment]:
    """Return a conversation up to its last learnt answer as segments, in order.

    learnt  of each answer, one at least; None: all are. An answer that is not is prompt.

    Raises InputError where the template writes a learnt answer's prompt otherwise once the answer
    is there, writes nothing for the answer, or does not end it with a special token.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    flags = [True] * len(answers) if learnt is None else learnt
    taught = [(n, i) for n, (i, flag) in enumerate(zip(answers, flags, strict=True), 1) if flag]
    last = taught[-1][1]
    whole = template.encode(messages[: last + 1], prompts=False)
    segments: list[Segment] = []
    done = 0
    for number, i in taught:
        prompt = template.encode(messages[:i])
        start = _common(prompt, whole)
        if start < len(prompt):
            raise _not_kept(template, number, prompt, whole)
        answered = whole if i == last else template.encode(messages[: i + 1], prompts=False)
        # Some templates put a token after the last message alone, behind the answer's own end.
        stop = _common(answered, whole)
        end = start + _length(template, number, whole[start:stop], answered[stop:])
        segments += [Segment(whole[done:start], False), Segment(whole[start:end], True)]
        done = end
    return [*segments, Segment(whole[done:], False)] if done < len(whole) else segments


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _length(template: ChatTemplate, number: int, ids: Sequence[int], rest: Sequence[int]) -> int:
    """Return the number of tokens of an answer that ``ids`` begin with, its end token included.

    The end token is the last special one; only white space may follow it. ``rest`` is what the
    template writes behind ``ids`` only while no message follows the answer; if that holds text,
    the answer is written otherwise once one does.
    """
    tokenizer = template.tokenizer
    ends = {id_ for name, id_ in tokenizer.special.items() if name not in tokenizer.ordinary}
    last = max((i for i, id_ in enumerate(ids) if id_ in ends), default=-1)
    is_ended = last >= 0 and not tokenizer.decode(ids[last + 1 :]).strip()
    if tokenizer.decode(rest).strip() or (rest and not is_ended):
        raise InputError(
            f"{template.origin}: writes answer {number} otherwise once messages follow it, so that "
            "it cannot be learnt as it is generated; learn the last answer alone (weight 0 on the "
            "others), or choose another --template"
        )
    if not tokenizer.decode(ids).strip():
        raise InputError(
            f"{template.origin}: writes nothing for answer {number}, so that there is nothing to "
            "learn; choose another --template, which writes message['content']"
        )
    if is_ended:
        return last + 1
    raise InputError(
        f"{template.origin}: ends answer {number} with {_tail(tokenizer, ids)!r} and no special "
        "token, so that a model would never learn to stop; let it write {{ eos_token }} there, or "
        "choose another --template"
    )


def _not_kept(
    template: ChatTemplate, number: int, prompt: Sequence[int], whole: Sequence[int]
) -> InputError:
    """Return the error of a prompt that is not how the conversation with its answer begins."""
    tokenizer, at = template.tokenizer, _common(prompt, whole)
    before, after = (spelled(tokenizer, ids) for ids in (prompt, whole))
    if after.startswith(before):
        joined = spelled(tokenizer, whole[at : at + 1])
        return InputError(
            f"the end of answer {number}'s prompt and its own beginning are one token, {joined!r}, "
            "which generation never writes; remove the white space there, which is the answer's or "
            "the template's"
        )
    written, instead = (spelled(tokenizer, ids[at:])[:SHOWN] for ids in (prompt, whole))
    return InputError(
        f"{template.origin}: opens answer {number} with {written!r} when it is generated and with "
        f"{instead!r} when it is given; choose another --template, or learn the last answer alone "
        "(weight 0 on the others)"
    )


def _tail(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return spelled(tokenizer, ids)[-SHOWN:]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids, the special ones by their names."""
    parts = []
    for is_named, group in groupby(ids, tokenizer.names.__contains__):
        part = list(group)
        parts.append(
            "".join(tokenizer.names[id_] for id_ in part) if is_named else tokenizer.decode(part)
        )
    return "".join(parts)
