"""The interface of a tokenizer, and GPT-2's; json_tokenizer.py and pieces.py have the others."""

import contextlib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from llama_common.errors import InputError

from .gpt2 import (
    BLANK,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    gpt2,
    gpt2_ids,
    located,
    spelled_bytes,
)

# A name in the manner of special tokens, which may begin with SentencePiece's space.
MARKED = re.compile(r"▁?(?:<.+>|\[.+\])", re.DOTALL)

AFTER, BEFORE = re.compile(rf"\A{BLANK}+"), re.compile(rf"(?<!{BLANK}){BLANK}+\Z")


class Tokenizer(ABC):
    """Encodes text to token ids, and decodes them.

    special  the tokens that only a chat template can place: their spelling and id.
    ordinary those of them that are pieces of text as well, which text goes on spelling.
    hidden   the ids that stand for no text; those of the special tokens, unless said.
    n_ids    one more than the highest id.
    prefix   what goes before a prompt: one BOS where the checkpoint was trained with it.
    bos, eos spellings of the two, where the checkpoint names them.
    single_words, normalized  special tokens that are found in other ways; see ``placed``.
    lstrip, rstrip  ids of special tokens that take the blanks before, or after, them.
    others   spellings of other tokens by the names that templates have for them (pad_token, ...).
    """

    def __init__(
        self, special: Mapping[str, int], n_ids: int, hidden: Iterable[int] | None = None
    ) -> None:
        self.special, self.n_ids = dict(special), n_ids
        self.hidden = set(special.values() if hidden is None else hidden)
        self.ordinary: set[str] = set()
        self.prefix: tuple[int, ...] = ()
        self.bos: str | None = None
        self.eos: str | None = None
        self.single_words: set[str] = set()
        self.normalized: set[str] = set()
        self.lstrip: set[int] = set()
        self.rstrip: set[int] = set()
        self.others: dict[str, str] = {}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, without a prefix.

        Raises EncodingError where the library panics.
        """

    @abstractmethod
    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ids that are not special, each below ``n_ids``."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ones and those beyond the tokenizer stand for none."""
        return self.decode_ordinary([i for i in ids if self.is_text(i)])

    def is_text(self, id_: int) -> bool:
        """Return whether an id stands for text."""
        return id_ < self.n_ids and id_ not in self.hidden

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of ordinary text and of the special tokens (given by id) between it.

        Raises EncodingError where the library panics.
        """
        ids: list[int] = []
        for part in parts:
            ids += self.encode(part) if isinstance(part, str) else [part]
        return ids

    def stripped(self, parts: Sequence[str | int]) -> Iterator[str | int]:
        """Yield text and ids without the blanks that special tokens take; no empty text."""
        for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
            if isinstance(part, str):
                part = AFTER.sub("", part) if before in self.rstrip else part
                part = BEFORE.sub("", part) if after in self.lstrip else part
            if part != "":
                yield part

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """The special tokens' spellings by their ids."""
        return {id_: name for name, id_ in self.special.items()}

    def token_id(self, text: str, flag: str) -> int:
        """Return the id of one token, special or not; InputError for any other text."""
        if text in self.special:
            return self.special[text]
        with located(f"{flag} {text[:20]!r}"):
            ids = self.encode(text)
        if len(ids) != 1:
            raise InputError(f"{flag} {text!r} is {len(ids)} tokens and no special token")
        return ids[0]


class Gpt2(Tokenizer):
    """The GPT-2 encoding, through tiktoken."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        """Name some of its pieces in ``named``, which templates place then."""
        ordinary = _gpt2_pieces(named)
        end = {END_OF_TEXT: END_OF_TEXT_ID}
        super().__init__(end | ordinary, VOCAB_SIZE, end.values())
        self.ordinary = set(ordinary)
        self.encoding: tiktoken.Encoding = gpt2()
        self.bos = self.eos = END_OF_TEXT

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        return gpt2_ids(text)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return self.encoding.decode(ids, errors="replace")


def _gpt2_pieces(names: Iterable[str]) -> dict[str, int]:
    """Return the ids of those of some names that spell a piece of GPT-2's."""
    byte_of = spelled_bytes()
    found = {}
    for name in names:
        with contextlib.suppress(KeyError):  # a character that spells no byte, or no piece
            piece = bytes(byte_of[character] for character in name)
            found[name] = gpt2().encode_single_token(piece)
    return {name: id_ for name, id_ in found.items() if id_ != END_OF_TEXT_ID}


def import_library(name: str, path: Path) -> Any:
    """Return an optional library; InputError says how to install it for ``path``."""
    try:
        return __import__(name)
    except ImportError:
        raise InputError(
            f"{path}: reading it needs {name}; pip install 'llama-parity[{name}]'"
        ) from None
