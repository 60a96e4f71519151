"""Read a run's conversations and label them: on the main process, before the first step."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from llama_common.errors import InputError, printable
from llama_common.files import read_json

from ..checkpoint.file_names import GENERATION_FILE
from ..common.reading import told
from ..data.conversations import Conversation, read_conversations
from ..finetuning_config import ConversationConfig, SftConfig
from ..inference.generation_file import end_ids
from ..tokenizer.answers import Segment, answer_segments, spelled
from ..tokenizer.chat_template import ChatTemplate, Message, load_jinja
from ..tokenizer.tokenizer import Tokenizer
from .labels import Examples, cut_to

T = TypeVar("T")

TEMPLATE_FILE = "chat_template.jinja"
# The date that templates see: tokens must not depend on the day on which a run is resumed.
DAY = "2024-07-26"
OPEN, CLOSE = "{+", "+}"  # around what is learnt
SHOWN = 2000  # characters of the conversation that is shown


class Loaded(NamedTuple):
    """What the main process reads and labels, for all processes of a job."""

    train: Examples
    val: Examples
    end_ids: frozenset[int]  # that answers end with
    lines: list[str]  # on what was cut and what is learnt
    directory_files: dict[str, str]  # texts by name
    prompt: tuple[str, list[int]]  # of the samples, as text and as ids


class Labelled(NamedTuple):
    """Conversations as segments that fit the context."""

    segments: list[list[Segment]]
    places: list[str]  # of each
    n_cut: int  # of them, those that lost their last turns
    n_left_out: int  # conversations of which not even the first answer fits


def load_conversations(
    config: SftConfig, directory: Path, tokenizer: Tokenizer, template_name: str
) -> Loaded:
    """Read and label the conversations of a run.

    directory      of the model, whose chat template is used where ``template_name`` is empty.
    template_name  a Jinja file, or llama2.

    Raises InputError, with file and line, for conversations that cannot be learnt from.
    """
    template = load_jinja(directory, tokenizer, template_name, DAY)
    train, val = _split(config.data)
    context = config.model.max_seq_len
    learning, held_out = (_label(part, template, context) for part in (train, val))
    ends = frozenset(
        segment.ids[-1] for one in learning.segments for segment in one if segment.learnt
    )
    lines = _counted(learning, held_out, context)
    files = {TEMPLATE_FILE: template.source} if template_name else {}
    known = end_ids(directory, tokenizer, config.model.vocab_size)
    if not ends <= known:
        files[GENERATION_FILE] = _generation_file(directory, known | ends)
        lines.append(f"{GENERATION_FILE} names the template's end of an answer as an end token")
    lines += [f"learnt of {learning.places[0]}, between {OPEN} and {CLOSE}:"]
    lines += _marked(tokenizer, learning.segments[0])
    prompt = _prompt(config.sample_prompt, val[0], template)
    shown = spelled(tokenizer, prompt), prompt
    train_examples, val_examples = Examples.of(learning.segments), Examples.of(held_out.segments)
    return Loaded(train_examples, val_examples, ends, lines, files, shown)


def _split(config: ConversationConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to learn from and those held out."""
    given = [*told(read_conversations(config.data), "conversations read")]
    val = read_conversations(config.val_data, "--val-data")
    named = [*told(val, "held-out conversations read")] if config.val_data else None
    return held_apart(given, named, config.val_fraction, "conversation")


def held_apart(
    given: list[T], named: list[T] | None, share: float, noun: str
) -> tuple[list[T], list[T]]:
    """Return the records to learn from and those held out.

    named  those of --val-data; None: a share of ``given`` is held out, spread evenly over it.

    Raises InputError where one of the two would be empty.
    """
    if named is not None:
        for flag, found in (("--data", given), ("--val-data", named)):
            if not found:
                raise InputError(f"{flag}: holds no {noun}; name files that do")
        return given, named
    if len(given) < 2:
        told = f"{len(given)} {noun}" + "s" * (len(given) != 1)
        raise InputError(
            f"--data: {told} can be used, and one must be held out; give more, or name held-out "
            "ones with --val-data"
        )
    chosen = spread_over(len(given), share)
    kept = [one for i, one in enumerate(given) if i not in chosen]
    return kept, [given[i] for i in sorted(chosen)]


def spread_over(n: int, share: float) -> set[int]:
    """Return the numbers of a share of n records, spread evenly; one at least, and not all."""
    n_chosen = min(n - 1, max(1, int(n * share)))
    return {(2 * i + 1) * n // (2 * n_chosen) for i in range(n_chosen)}


def _label(conversations: Sequence[Conversation], template: ChatTemplate, context: int) -> Labelled:
    found: list[list[Segment]] = []
    places, n_cut = [], 0
    for one in told(conversations, "conversations tokenised"):
        try:
            whole = answer_segments(template, one.messages, one.learnt)
        except InputError as error:
            raise InputError(f"{one.place}: {error}") from None
        fitting = cut_to(whole, context)
        if fitting:
            found.append(fitting)
            places.append(one.place)
            n_cut += any(segment.learnt for segment in whole[len(fitting) :])
    if not found:
        raise InputError(
            f"--max-seq-len {context}: the first answer to learn of {conversations[0].place} ends "
            "beyond it, as that of every other conversation does; make it longer"
        )
    return Labelled(found, places, n_cut, len(conversations) - len(found))


def _counted(learning: Labelled, held_out: Labelled, context: int) -> list[str]:
    """Return a line on conversations that are longer than the context, if any are."""
    n_cut, n_left_out = learning.n_cut + held_out.n_cut, learning.n_left_out + held_out.n_left_out
    if not n_cut + n_left_out:
        return []
    return [
        f"longer than {context:,} tokens: {n_cut:,} conversations, cut after the last answer to "
        f"learn that fits, and {n_left_out:,} left out, of which none does"
    ]


def _generation_file(directory: Path, ends: Collection[int]) -> str:
    """Return generation_config.json with those end tokens."""
    path = directory / GENERATION_FILE
    content = read_json(path) if path.is_file() else {}
    return json.dumps(content | {"eos_token_id": sorted(ends)}, indent=2) + "\n"


def _marked(tokenizer: Tokenizer, segments: Sequence[Segment]) -> list[str]:
    """Return a conversation as lines, with marks around what is learnt."""
    texts = [spelled(tokenizer, segment.ids) for segment in segments]
    pairs = zip(segments, texts, strict=True)
    text = "".join(OPEN + text + CLOSE if segment.learnt else text for segment, text in pairs)
    if len(text) > SHOWN:
        text = (
            f"{text[: SHOWN // 2]} ... {len(text) - SHOWN:,} characters ... {text[-SHOWN // 2 :]}"
        )
    return [f"  | {printable(line)}" for line in text.split("\n")]


def _prompt(text: str, held_out: Conversation, template: ChatTemplate) -> list[int]:
    """Return the ids of the samples' prompt: a user's text, or the first learnt answer's."""
    messages: list[Message] = [{"role": "user", "content": text}]
    if not text:
        messages = held_out.first_prompt
    try:
        return template.encode(messages)
    except InputError as error:
        raise InputError(f"--sample-prompt: {error}") from None
