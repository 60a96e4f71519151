"""Read a run's pairs of answers and tokenise them: on the main process, before the first step."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_common.errors import InputError, printable
from llama_common.files import read_json

from ..checkpoint.directory_files import CONFIG_FILE, config_content
from ..common.reading import told
from ..data.preferences import Pair, read_pairs
from ..finetuning_config import PreferenceConfig, RewardConfig
from ..model.config import REWARD_KEYS, ModelConfig
from ..tokenizer.answers import spelled
from ..tokenizer.chat_template import ChatTemplate, Message, load_jinja
from ..tokenizer.tokenizer import Tokenizer
from .conversation_loading import DAY, TEMPLATE_FILE, held_apart
from .pair_objective import STRENGTHS

TAIL = 4  # tokens that are shown of a conversation's end


class Pairs(NamedTuple):
    """Tokenised pairs, one behind the other: P pairs of N tokens in all."""

    tokens: NDArray[np.int32]  # [N]: chosen, rejected, the next pair's chosen, ...
    starts: NDArray[np.int64]  # [2 P + 1]
    columns: NDArray[np.int64]  # [2 P, 3]: strength, tagged, safe; see pair_objective.Column
    places: list[str]  # [P]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each conversation, [2 P]."""
        return np.diff(self.starts)

    @property
    def last_ids(self) -> set[int]:
        """The ids that conversations end with."""
        return set(self.tokens[self.starts[1:] - 1].tolist())


class LoadedPairs(NamedTuple):
    """What the main process reads, for all processes of a job."""

    train: Pairs
    val: Pairs
    lines: list[str]  # on what was left out, and where scores are read
    directory_files: dict[str, str]  # texts by name


def load_pairs(
    config: RewardConfig,
    model: ModelConfig,
    directory: Path,
    tokenizer: Tokenizer,
    template_name: str,
) -> LoadedPairs:
    """Read and tokenise the pairs of a run.

    directory      of the model, whose chat template is used where ``template_name`` is empty.
    template_name  a Jinja file, or llama2.

    Raises InputError, with file and line, for pairs that cannot be learnt from.
    """
    template = load_jinja(directory, tokenizer, template_name, DAY)
    context = config.model.max_seq_len
    given = _split(config.data)
    train, val = (tokenise(pairs, template, context) for pairs in given)
    n_long = sum(map(len, given)) - len(train.places) - len(val.places)
    lines = [f"longer than {context:,} tokens: {n_long:,} pairs, left out"] if n_long else []
    if config.safety_loss and not (train.columns[:, 2] >= 0).any():
        raise InputError(
            "--safety-loss: no pair says whether its answers are safe; give chosen_safe and "
            "rejected_safe, true or false, or leave it out"
        )
    end = train.tokens[: train.starts[1]][-TAIL:].tolist()
    shown = printable(spelled(tokenizer, end))
    lines.append(f"scored at the last token of each conversation: {train.places[0]} ends {shown!r}")
    hf = {**config_content(model, directory), **REWARD_KEYS}
    hf["pad_token_id"] = pad_id(directory, model.vocab_size, train.last_ids | val.last_ids)
    files = {CONFIG_FILE: json.dumps(hf, indent=2) + "\n"}
    if template_name:
        files[TEMPLATE_FILE] = template.source
    return LoadedPairs(train, val, lines, files)


def pad_id(directory: Path, vocab_size: int, last_ids: Collection[int]) -> int:
    """Return an id that no conversation ends with: the model's own padding, else the smallest.

    transformers reads the score at the last token that is not padding. Where an end token pads as
    well, as in many checkpoints, that is the one before the end.
    """
    path = directory / CONFIG_FILE
    own = read_json(path).get("pad_token_id") if path.is_file() else None
    candidates = [own] if type(own) is int and 0 <= own < vocab_size else []
    for id_ in (*candidates, *range(min(vocab_size, len(last_ids) + 1))):
        if id_ not in last_ids:
            return id_
    raise InputError(
        "--template: some conversation ends with every token of the vocabulary, so that none is "
        "left for padding; let it write an end token after an answer"
    )


def _split(config: PreferenceConfig) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to learn from and those held out."""
    given = [*told(read_pairs(config.data), "pairs read")]
    val = read_pairs(config.val_data, "--val-data")
    named = [*told(val, "held-out pairs read")] if config.val_data else None
    return held_apart(given, named, config.val_fraction, "pair")


def tokenise(pairs: Sequence[Pair], template: ChatTemplate, context: int) -> Pairs:
    """Return the pairs of which both conversations fit the context.

    Raises InputError, with file and line, where the template fails or writes both answers alike,
    and where no pair fits.
    """
    tokens, lengths, columns, places = [np.empty(0, np.int32)], [0], list[list[int]](), []
    for pair in told(pairs, "pairs tokenised"):
        ids = encode_pair(template, pair)
        if max(map(len, ids)) > context:
            continue
        for own, is_safe in zip(ids, pair.is_safe, strict=True):
            tokens.append(np.array(own, np.int32))
            lengths.append(len(own))
            safe = -1 if is_safe is None else int(is_safe)
            columns.append([pair.strength, int(pair.is_tagged), safe])
        places.append(pair.place)
    if not places:
        raise InputError(
            f"--max-seq-len {context}: {pairs[0].place} is longer, as every other pair is; make it "
            "longer"
        )
    starts = np.cumsum(lengths)
    return Pairs(np.concatenate(tokens), starts, np.array(columns, np.int64), places)


def encode_pair(template: ChatTemplate, pair: Pair) -> tuple[list[int], list[int]]:
    """Return the ids of a pair's two conversations, the chosen one first.

    Raises InputError, with file and line, where the template fails or writes both alike.
    """
    chosen, rejected = (_encoded(template, pair, x) for x in (pair.chosen, pair.rejected))
    if chosen == rejected:
        raise InputError(
            f"{pair.place}: {template.origin} writes the chosen and the rejected answer alike; "
            "remove the line, or choose another --template"
        )
    return chosen, rejected


def _encoded(template: ChatTemplate, pair: Pair, messages: Sequence[Message]) -> list[int]:
    try:
        ids = template.encode(messages, prompts=False)
    except InputError as error:
        raise InputError(f"{pair.place}: {error}") from None
    if not ids:
        raise InputError(f"{pair.place}: {template.origin} writes nothing; choose another")
    return ids


def count_strengths(pairs: Pairs) -> str:
    """Return the numbers of pairs by strength, for people."""
    found = np.bincount(pairs.columns[::2, 0], minlength=len(STRENGTHS)).tolist()
    return ", ".join(f"{n:,} {name}" for n, name in zip(found, STRENGTHS, strict=True) if n)
