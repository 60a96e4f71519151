"""The prompt that a run's samples continue."""

from typing import NamedTuple

from ..tokenizer.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """What the samples of a run continue, and with what they end."""

    text: str  # as it is shown
    ids: list[int]
    tokenizer: Tokenizer
    end_ids: frozenset[int] = frozenset()  # ids that end the sample
