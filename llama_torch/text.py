"""The tokenizer of a checkpoint, whichever of three kinds its directory holds.

GPT-2's encoding comes with the package; ``tokenizer.json`` needs the tokenizers library and
``tokenizer.model`` sentencepiece (extras of the same names). What a user writes is never read
as a special token, whatever it spells: only a chat template can place those.
"""

import functools
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from .config import InputError, read_json
from .tokenizer import END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, gpt2, hf_files

UNFINISHED = "\ufffd"  # how decoders show the bytes of a character that is not complete


class Tokenizer(ABC):
    """Text to token ids and back.

    special  the special tokens: their spelling and id.
    n_ids    one more than the highest id.
    prefix   what goes before a prompt: one BOS where the checkpoint was trained with it.
    bos, eos spellings of the two, where the checkpoint names them.
    """

    def __init__(self, special: Mapping[str, int], n_ids: int) -> None:
        self.special, self.n_ids = dict(special), n_ids
        self.prefix: tuple[int, ...] = ()
        self.bos: str | None = None
        self.eos: str | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, without a prefix."""

    @abstractmethod
    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ids that are not special, each below ``n_ids``."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ones and those beyond the tokenizer stand for none."""
        left_out = set(self.special.values())
        return self.decode_ordinary([i for i in ids if i < self.n_ids and i not in left_out])

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of text in which special tokens count, unless ``mark`` breaks them up.

        The mark itself is left out. Ordinary text between two special tokens is encoded alone.
        """
        ids: list[int] = []
        for part in _split(text, self.special):
            known = self.special.get(part)
            ids += self.encode(part.replace(mark, "")) if known is None else [known]
        return ids

    def token_id(self, text: str, flag: str) -> int:
        """Return the id of one token, special or not; InputError for any other text."""
        if text in self.special:
            return self.special[text]
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
        return self.encoding.encode_ordinary(text)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return self.encoding.decode(ids, errors="replace")


class Json(Tokenizer):
    """A ``tokenizer.json``, through the tokenizers library.

    Its special tokens are renamed, with a random word in front that nobody can guess, so that
    no text spells one by accident or on purpose, and a template's are renamed likewise.
    """

    def __init__(self, path: Path) -> None:
        library = _library("tokenizers", path)
        content = read_json(path)
        self.word = secrets.token_hex(8)
        added = [token for token in content.get("added_tokens") or [] if token.get("special")]
        try:
            special = {token["content"]: token["id"] for token in added}
            renamed = _renamed(content, special, self.word)
            self.tokenizer = library.Tokenizer.from_str(json.dumps(renamed))
        except Exception as error:  # the library raises bare exceptions
            raise InputError(f"{path}: not a tokenizer ({error}); copy it again") from None
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(special, max(vocab.values(), default=-1) + 1)
        # What its own post-processor puts before any text.
        framed = self.tokenizer.encode("a", add_special_tokens=True).ids
        self.prefix = tuple(framed[: _find(framed, self.encode("a"))])

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of text in which unbroken special tokens count."""
        parts = (self.word + p if p in self.special else p for p in _split(text, self.special))
        return self.encode("".join(parts).replace(mark, ""))


def _renamed(content: dict[str, Any], special: Mapping[str, int], word: str) -> dict[str, Any]:
    """Put ``word`` before the name of every special token, wherever the file defines it."""

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
    added = [{**t, "content": new(t["content"])} for t in content["added_tokens"]]
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


def load_tokenizer(ckpt: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model directory (or of a file's) whose model has that vocabulary.

    Raises InputError for files that cannot be read, ids beyond the vocabulary, special tokens
    that the tokenizer does not have, and a directory without a tokenizer whose vocabulary
    cannot be GPT-2's.
    """
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    tokenizer, source = _find_tokenizer(ckpt, folder, vocab_size)
    if tokenizer.n_ids > vocab_size:
        raise InputError(
            f"{source}: has token id {tokenizer.n_ids - 1}, beyond the model's vocabulary of "
            f"{vocab_size}; it belongs to another checkpoint"
        )
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        if (folder / name).is_file():
            _apply_settings(tokenizer, read_json(folder / name), folder / name)
    return tokenizer


def _find_tokenizer(ckpt: Path, folder: Path, vocab_size: int) -> tuple[Tokenizer, Path]:
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        return (Gpt2() if _is_gpt2(read_json(fast)) else Json(fast)), fast
    if pieces.is_file():
        return SentencePiece(pieces), pieces
    if not VOCAB_SIZE <= vocab_size < 2 * VOCAB_SIZE:
        raise InputError(
            f"{folder}: holds no tokenizer.json and no tokenizer.model, and a vocabulary of "
            f"{vocab_size} is not GPT-2's; copy the checkpoint's tokenizer there"
        )
    return Gpt2(), ckpt


@functools.lru_cache(maxsize=1)
def _gpt2_json() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(hf_files()["tokenizer.json"])
    return content


def _is_gpt2(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is GPT-2's encoding and nothing else."""
    model, ours = content.get("model"), _gpt2_json()
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return False
    vocab = {**model["vocab"], END_OF_TEXT: END_OF_TEXT_ID}
    added = [token.get("content") for token in content.get("added_tokens") or []]
    splitting = {**ours["pre_tokenizer"], **(content.get("pre_tokenizer") or {})}
    post = content.get("post_processor") or {"type": "ByteLevel"}
    return (
        vocab == ours["model"]["vocab"]
        and set(added) <= {END_OF_TEXT}
        and content.get("normalizer") is None
        and (splitting["type"], splitting["add_prefix_space"]) == ("ByteLevel", False)
        and post["type"] == "ByteLevel"
    )


def _apply_settings(tokenizer: Tokenizer, settings: dict[str, Any], path: Path) -> None:
    """Take the names of BOS and EOS, and whether BOS goes first, from tokenizer_config.json."""
    beyond = _added(settings)
    if isinstance(tokenizer, SentencePiece) and beyond:
        new = {name: id_ for name, id_ in beyond.items() if id_ >= tokenizer.n_ids}
        if new:
            raise InputError(
                f"{path}: adds {', '.join(new)} to tokenizer.model; put the checkpoint's "
                "tokenizer.json there"
            )
    for role in ("bos", "eos"):
        named = settings.get(f"{role}_token")
        name = named.get("content") if isinstance(named, dict) else named
        if name is None:
            continue
        if name not in tokenizer.special:
            raise InputError(
                f"{path}: {role}_token is {name!r}, which is no special token of the tokenizer; "
                "correct one of them"
            )
        setattr(tokenizer, role, name)
    adds = settings.get("add_bos_token")
    if adds is False:
        tokenizer.prefix = ()
    elif adds is True and tokenizer.bos is not None:
        tokenizer.prefix = (tokenizer.special[tokenizer.bos],)


def _added(settings: dict[str, Any]) -> dict[str, int]:
    decoder = settings.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return {}
    return {str(token.get("content")): int(id_) for id_, token in decoder.items()}


def end_ids(ckpt: Path, tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """Return the ids that end a text: of generation_config.json, else config.json, else EOS.

    Raises InputError for ids beyond the vocabulary.
    """
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        given = read_json(path).get("eos_token_id") if path.is_file() else None
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        for id_ in ids:
            if type(id_) is not int or not 0 <= id_ < vocab_size:
                raise InputError(
                    f"{path}: eos_token_id {id_!r} is no token of the vocabulary of {vocab_size}; "
                    "correct it"
                )
        return set(ids)
    return set() if tokenizer.eos is None else {tokenizer.special[tokenizer.eos]}


class TextStream:
    """Text as it becomes complete, one token at a time.

    A character is never split between two pieces, and neither is a stop text: what may become
    one is held back. ``before`` are the ids that the text continues.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.decode: Callable[[Iterable[int]], str] = tokenizer.decode
        self.stop = stop
        # Decoders treat a beginning differently (Llama 2's drops a space), so each piece is
        # decoded after the one before it.
        self.window = self._tail(list(before))
        self.fresh = len(self.window)  # where the newest piece begins
        self.shown = len(self.decode(self.window))  # characters of the window already given out
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self.window.append(token)
        return self._release(self._grown())

    def finish(self) -> str:
        """Return what was held back, with the bytes of an unfinished character marked."""
        text, self.held = self.held + self.decode(self.window)[self.shown :], ""
        cut = self._cut(text)
        self.stopped |= cut is not None
        return text[:cut]

    def _tail(self, ids: list[int]) -> list[int]:
        """Return the last few ids, more where these begin inside a character."""
        starts = range(max(len(ids) - 4, 0), 0, -1)
        whole = (n for n in starts if not self.decode(ids[n:]).startswith(UNFINISHED))
        return ids[next(whole, 0) :]

    def _grown(self) -> str:
        text = self.decode(self.window)
        ready = text.rstrip(UNFINISHED)
        piece = ready[self.shown :]
        self.shown = max(self.shown, len(ready))
        if ready == text:
            self.window, self.fresh = self.window[self.fresh :], len(self.window) - self.fresh
            self.shown = len(self.decode(self.window))
        return piece

    def _release(self, piece: str) -> str:
        text, self.held = self.held + piece, ""
        cut = self._cut(text)
        if cut is not None:
            self.stopped = True
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> int | None:
        """Return where the stop text that is complete first begins, however tokens divide it."""
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stop if stop in text]
        return sum(min(ends)) if ends else None


def _overlap(text: str, stop: str) -> int:
    """Return how much of the text's end may be the beginning of a stop text."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
