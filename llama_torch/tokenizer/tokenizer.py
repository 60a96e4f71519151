"""Three kinds of tokenizers behind one interface: GPT-2, tokenizer.json, SentencePiece."""

import functools
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from ..common.errors import InputError
from .gpt2 import END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, gpt2, gpt2_ids, guarded, located

MARKED = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class Tokenizer(ABC):
    """Encodes text to token ids, and decodes them.

    special  the tokens that only a chat template can place: their spelling and id.
    hidden   the ids that stand for no text; those of the special tokens, unless said.
    n_ids    one more than the highest id.
    prefix   what goes before a prompt: one BOS where the checkpoint was trained with it.
    bos, eos spellings of the two, where the checkpoint names them.
    """

    def __init__(
        self, special: Mapping[str, int], n_ids: int, hidden: Iterable[int] | None = None
    ) -> None:
        self.special, self.n_ids = dict(special), n_ids
        self.hidden = set(special.values() if hidden is None else hidden)
        self.prefix: tuple[int, ...] = ()
        self.bos: str | None = None
        self.eos: str | None = None

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

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of text in which special tokens count, unless ``mark`` breaks them up.

        The mark itself is left out. Ordinary text between two special tokens is encoded alone.
        """
        ids: list[int] = []
        for part in _split(text, self.special):
            known = self.special.get(part)
            ids += self.encode(part.replace(mark, "")) if known is None else [known]
        return ids

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


def _split(text: str, special: Mapping[str, int]) -> Iterator[str]:
    if not special:
        yield text
        return
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "(" + "|".join(re.escape(token) for token in longest_first) + ")"
    yield from (part for part in re.split(pattern, text) if part)


class Gpt2(Tokenizer):
    """The GPT-2 encoding, through tiktoken."""

    def __init__(self) -> None:
        super().__init__({END_OF_TEXT: END_OF_TEXT_ID}, VOCAB_SIZE)
        self.encoding: tiktoken.Encoding = gpt2()
        self.bos = self.eos = END_OF_TEXT

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        return gpt2_ids(text)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return self.encoding.decode(ids, errors="replace")


class Json(Tokenizer):
    """A ``tokenizer.json``, through the tokenizers library.

    Its special tokens, and what is marked like one (``<|im_start|>`` is not always called
    special), are renamed with a random word in front that nobody can guess, so that no text
    spells one by accident or on purpose; a template's are renamed in the same way. ``named`` are
    special too: tokens that other files call BOS or EOS.
    """

    def __init__(self, path: Path, content: dict[str, Any], named: Collection[str]) -> None:
        library = _library("tokenizers", path)
        self.word = secrets.token_hex(8)
        try:
            added = content.get("added_tokens") or []
            marked = {t["content"] for t in added if MARKED.fullmatch(t["content"])}
            hidden = {t["content"] for t in added if t["special"]} | set(named)
            renamed = _renamed(content, marked | hidden, self.word)
            with guarded("tokenizers", ""):
                self.tokenizer = library.Tokenizer.from_str(json.dumps(renamed))
        except Exception as error:  # the library raises bare exceptions
            raise InputError(f"{path}: not a tokenizer ({error}); copy it again") from None
        self.tokenizer.no_truncation()  # of the training that made it
        self.tokenizer.no_padding()
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        n_ids = max(vocab.values(), default=-1) + 1
        # A name that BOS or EOS has and the tokenizer has not is reported where it is used.
        names = sorted(marked | hidden)  # a set's order is another in every process
        special = {n: vocab[self.word + n] for n in names if self.word + n in vocab}
        super().__init__(special, n_ids, [special[n] for n in hidden if n in special])
        # What its own post-processor puts before any text.
        framed = self.tokenizer.encode("a", add_special_tokens=True).ids
        self.prefix = tuple(framed[: _find(framed, self.encode("a"))])

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        with guarded("tokenizers", text):
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return str(self.tokenizer.decode(list(ids))).replace(self.word, "")

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of text in which unbroken special tokens count."""
        parts = (self.word + p if p in self.special else p for p in _split(text, self.special))
        return self.encode("".join(parts).replace(mark, ""))


def _renamed(content: dict[str, Any], special: Collection[str], word: str) -> dict[str, Any]:
    """Return the file's content with ``word`` before every special token's name."""

    def new(name: str) -> str:
        return word + name if name in special else name

    model = dict(content["model"])
    vocab = model.get("vocab", {})
    if isinstance(vocab, dict):
        model["vocab"] = {new(name): id_ for name, id_ in vocab.items()}
    else:
        model["vocab"] = [[new(name), score] for name, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new(model["unk_token"])
    added = [{**t, "content": new(t["content"])} for t in content.get("added_tokens") or []]
    return {**content, "model": model, "added_tokens": added}


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    starts = range(len(ids) - len(part) + 1)
    return next((i for i in starts if list(ids[i : i + len(part)]) == list(part)), 0)


class SentencePiece(Tokenizer):
    """A ``tokenizer.model``, through the sentencepiece library; BOS first, as Llama 2 has it."""

    def __init__(self, path: Path) -> None:
        library = _library("sentencepiece", path)
        try:
            self.processor = library.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise InputError(
                f"{path}: not a SentencePiece model (Llama 3's is of another kind); put the "
                "checkpoint's tokenizer.json beside it"
            ) from None
        pieces = self.processor
        ids = range(pieces.get_piece_size())
        hidden = [i for i in ids if pieces.is_control(i) or pieces.is_unknown(i)]
        special = {pieces.id_to_piece(i): i for i in hidden}
        super().__init__(special, pieces.get_piece_size())
        if pieces.bos_id() >= 0:
            self.bos, self.prefix = pieces.id_to_piece(pieces.bos_id()), (pieces.bos_id(),)
        if pieces.eos_id() >= 0:
            self.eos = pieces.id_to_piece(pieces.eos_id())

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        return list(self.processor.encode(text))

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return str(self.processor.decode(list(ids)))


def _library(name: str, path: Path) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise InputError(
            f"{path}: reading it needs {name}; pip install 'llama-parity[{name}]'"
        ) from None
