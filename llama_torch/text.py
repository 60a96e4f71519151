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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from .config import InputError, read_json
from .tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    gpt2,
    gpt2_ids,
    guarded,
    hf_files,
    located,
)

MARKED = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class Tokenizer(ABC):
    """Text to token ids and back.

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
    spells one by accident or on purpose; a template's are renamed likewise. ``named`` are special
    too: tokens that other files call BOS or EOS.
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


def load_tokenizer(ckpt: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model directory (or of a file's) whose model has that vocabulary.

    Raises InputError for files that cannot be read, ids beyond the vocabulary, special tokens
    that the tokenizer does not have, and a directory without a tokenizer whose vocabulary
    cannot be GPT-2's.
    """
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    settings = _settings(folder)
    names = {settings[role] for role in ("bos_token", "eos_token") if role in settings}
    tokenizer, source = _find_tokenizer(ckpt, folder, vocab_size, names)
    if tokenizer.n_ids > vocab_size:
        raise InputError(
            f"{source}: has token id {tokenizer.n_ids - 1}, beyond the model's vocabulary of "
            f"{vocab_size}; it belongs to another checkpoint"
        )
    _apply_settings(tokenizer, settings, folder)
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """Read what the files beside a tokenizer say of it: BOS and EOS by name, tokens added."""
    found: dict[str, Any] = {"added": {}}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        if not (folder / file).is_file():
            continue
        given = read_json(folder / file)
        for role in ("bos_token", "eos_token"):
            token = given.get(role)
            name = token.get("content") if isinstance(token, dict) else token
            if name and not isinstance(name, str):
                raise InputError(f"{folder / file}: {role} is {name!r} and no text; correct it")
            found |= {role: name} if name else {}
        found["add_bos_token"] = given.get("add_bos_token")
        decoder = given.get("added_tokens_decoder")
        for id_, token in decoder.items() if isinstance(decoder, dict) else ():
            if id_.isdigit() and isinstance(token, dict):
                found["added"][str(token.get("content"))] = int(id_)
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        found["added"] |= {name: id_ for name, id_ in added.items() if type(id_) is int}
    return found


def _find_tokenizer(
    ckpt: Path, folder: Path, vocab_size: int, named: Collection[str]
) -> tuple[Tokenizer, Path]:
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        content = read_json(fast)
        return (Gpt2() if _is_gpt2(content) else Json(fast, content, named)), fast
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
    try:
        model = content["model"]
        if not VOCAB_SIZE - 1 <= len(model["vocab"]) <= VOCAB_SIZE:
            return False  # before the longer comparison, which most files need not wait for
        ours = _gpt2_json()
        vocab = {**model["vocab"], END_OF_TEXT: END_OF_TEXT_ID}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        added = {token["content"] for token in content["added_tokens"]}
        splitting = {**ours["pre_tokenizer"], **content["pre_tokenizer"]}
        post = (content.get("post_processor") or ours["pre_tokenizer"])["type"]
        kinds = {splitting["type"], content["decoder"]["type"], post}
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        (vocab, merges) == (ours["model"]["vocab"], ours["model"]["merges"])
        and added <= {END_OF_TEXT}
        and content.get("normalizer") is None
        and (kinds, splitting["add_prefix_space"]) == ({"ByteLevel"}, False)
    )


def _apply_settings(tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Give BOS and EOS their names. Where BOS goes first, a tokenizer.json says itself."""
    for role in ("bos", "eos"):
        name = settings.get(f"{role}_token")
        if name is not None and name not in tokenizer.special:
            raise InputError(
                f"{folder}: {role}_token is {name!r} in tokenizer_config.json (or "
                "special_tokens_map.json), which the tokenizer does not have; correct one of them"
            )
        setattr(tokenizer, role, name or getattr(tokenizer, role))
    if not isinstance(tokenizer, SentencePiece):
        return
    if new := [name for name, id_ in settings["added"].items() if id_ >= tokenizer.n_ids]:
        raise InputError(
            f"{folder}: adds {', '.join(new)} to tokenizer.model; put the checkpoint's "
            "tokenizer.json there"
        )
    if settings.get("add_bos_token") is False:
        tokenizer.prefix = ()


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
