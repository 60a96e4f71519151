"""A tokenizer from SentencePiece's ``tokenizer.model`` and the files beside it."""

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import InputError
from llama_common.files import require_no_pointer

from .settings import TokenizerSettings
from .tokenizer import MARKED, Tokenizer, import_library

# The kinds of pieces in a SentencePiece model.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# Appended to a model's bytes: normalizer_spec.add_dummy_prefix = false.
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePiece(Tokenizer):
    """A ``tokenizer.model``, by the sentencepiece library; BOS first, as Llama 2 has it.

    Pieces that are special here become control pieces in the library's copy of the model, which
    finds those in no text, unless they are ``ordinary``.
    """

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        if is_ranks(path):
            raise InputError(
                f"{path}: not a SentencePiece model but Llama 3's list of ranks; make "
                f"a tokenizer.json of it: python tools/convert.py {path.parent} NEW_DIR --to hf"
            )
        library = import_library("sentencepiece", path)
        try:
            proto = path.read_bytes()
            pieces = read_pieces(proto)
            special = _special(pieces, settings, path)
            ordinary = _ordinary(pieces, special)
            ids = {i for name, i in special.items() if i < len(pieces) and name not in ordinary}
            changed = {i: CONTROL for i in ids if pieces[i].kind in (NORMAL, USER_DEFINED)}
            proto = with_kinds(proto, changed)
            self.processor = library.SentencePieceProcessor(model_proto=proto)
        except InputError:
            raise
        except (RuntimeError, OSError, LookupError, UnicodeDecodeError, ValueError):
            raise InputError(
                f"{path}: not a SentencePiece model; put the checkpoint's tokenizer.json beside it"
            ) from None
        hidden = [id_ for name, id_ in special.items() if name not in ordinary]
        super().__init__(special, max([len(pieces) - 1, *special.values()]) + 1, hidden)
        self.ordinary = ordinary
        flags = {name: settings.added[name].flags for name in special if name in settings.added}
        self.single_words = {name for name in flags if flags[name].get("single_word")}
        self.lstrip = {special[name] for name in flags if flags[name].get("lstrip")}
        self.rstrip = {special[name] for name in flags if flags[name].get("rstrip")}
        names = {id_: name for name, id_ in special.items()}  # those of renamed pieces, too
        bos, eos = self.processor.bos_id(), self.processor.eos_id()  # -1 where there is none
        self.bos, self.prefix, self.eos = names.get(bos), (bos,) * (bos >= 0), names.get(eos)
        if settings.add_bos_token is False:
            self.prefix = ()
        self.proto = proto
        self.starts_with_space = settings.add_prefix_space is not False
        self.is_legacy = settings.legacy is not False and self.starts_with_space

    @functools.cached_property
    def unprefixed(self) -> Any:
        """The library's processor of the same model that puts no space before a text."""
        return type(self.processor)(model_proto=self.proto + NO_PREFIX)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, a space before it unless the checkpoint has none."""
        processor = self.processor if self.starts_with_space else self.unprefixed
        return list(processor.encode(text))

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of text and special tokens; a space after these if it is ``legacy``."""
        ids: list[int] = []
        for part in self.stripped(parts):
            if isinstance(part, int):
                ids.append(part)
            elif ids and not self.is_legacy:
                ids += self.unprefixed.encode(part)
            else:
                ids += self.encode(part)
        return ids

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids."""
        return str(self.processor.decode(list(ids)))


def is_ranks(path: Path) -> bool:
    """Return whether a ``tokenizer.model`` is Llama 3's: lines of base64 and a rank.

    SentencePiece's begins with the tag of a field, which is no printable character.
    Raises InputError for a git-LFS pointer.
    """
    require_no_pointer(path)
    with path.open("rb") as file:
        first = file.read(1)
    return first != b"" and first.isascii() and first.decode().isprintable()


class VocabularyPiece(NamedTuple):
    """One token of a SentencePiece model."""

    text: str
    kind: int


def _special(
    pieces: Sequence[VocabularyPiece], settings: TokenizerSettings, path: Path
) -> dict[str, int]:
    """Return the special tokens' ids: the model's own, marked, named, renamed or added."""
    special = {
        piece.text: i
        for i, piece in enumerate(pieces)
        if piece.kind in (CONTROL, UNKNOWN)
        or (piece.kind == USER_DEFINED and MARKED.fullmatch(piece.text))
    }
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    special |= {name: ids[name] for name in settings.roles.values() if name in ids}
    taken = len(pieces)
    for token in sorted(settings.added.values(), key=lambda t: (t.id is None, t.id)):
        is_special = token.flags.get("special", True) or MARKED.fullmatch(token.content)
        id_ = ids.get(token.content, taken) if token.id is None else token.id
        if id_ < len(pieces):
            if is_special:
                special = {name: i for name, i in special.items() if i != id_}
        elif not is_special:
            raise InputError(
                f"{token.source}: adds {token.content!r}, an ordinary token, to {path.name}; put "
                "the checkpoint's tokenizer.json there"
            )
        if is_special:
            special[token.content] = id_
        taken = max(taken, id_ + 1)
    return special


def _ordinary(pieces: Sequence[VocabularyPiece], special: Mapping[str, int]) -> set[str]:
    """Return the special tokens that are pieces of text: bytes, characters and learned pieces.

    Not one that is MARKED, and not one of several characters that the model's maker defined.
    """

    def is_ordinary(piece: VocabularyPiece) -> bool:
        is_text = piece.kind in (NORMAL, USER_DEFINED) and (
            len(piece.text) == 1 or (piece.kind == NORMAL and not MARKED.fullmatch(piece.text))
        )
        return is_text or piece.kind == BYTE

    return {
        name
        for name, id_ in special.items()
        if id_ < len(pieces) and pieces[id_].text == name and is_ordinary(pieces[id_])
    }


# The model's file: protocol buffers' encoding of sentencepiece's ModelProto.


def piece_spans(proto: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each piece's own message begins and ends in a model's bytes."""
    for number, _, start, end in _fields(proto):
        if number == 1:
            yield start, end


def read_pieces(proto: bytes) -> list[VocabularyPiece]:
    """Return the pieces of a model's bytes; ValueError or LookupError where it is damaged."""
    pieces = [read_piece(proto[start:end]) for start, end in piece_spans(proto)]
    if not pieces:
        raise ValueError("no pieces")
    return pieces


def read_piece(message: bytes) -> VocabularyPiece:
    """Return the piece that one message holds."""
    text, kind = "", NORMAL
    for number, value, start, end in _fields(message):
        if number == 1:
            text = message[start:end].decode()
        elif number == 3:
            kind = value
    return VocabularyPiece(text, kind)


def read_score(message: bytes) -> float:
    """Return the score of the piece that one message holds: of two merges the higher is done."""
    scores = [message[start:end] for number, _, start, end in _fields(message) if number == 2]
    return float(struct.unpack("<f", scores[-1])[0]) if scores else 0.0


def read_fields(proto: bytes, number: int) -> dict[int, tuple[int, bytes]]:
    """Return number and bytes of each field of a model's trainer (2) or normalizer (3)."""
    found: dict[int, tuple[int, bytes]] = {}
    for outer, _, start, end in _fields(proto):
        if outer == number:
            message = proto[start:end]
            found |= {key: (value, message[a:b]) for key, value, a, b in _fields(message)}
    return found


def with_kinds(proto: bytes, kinds: Mapping[int, int]) -> bytes:
    """Return a model's bytes in which pieces (by id) are of other kinds."""
    if not kinds:
        return proto
    found, done = [], 0
    for i, (start, end) in enumerate(piece_spans(proto)):
        if i in kinds:
            # A field that stands twice has its last value.
            message = proto[start:end] + bytes([3 << 3, kinds[i]])
            head = proto[done:start]
            length = varint(len(message))
            found += [head[: len(head) - len(varint(end - start))], length, message]
            done = end
    return b"".join([*found, proto[done:]])


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, its value (if a number), and where its content lies."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        value, start = 0, at
        if tag & 7 == 0:
            value, at = _read_varint(message, at)
        elif tag & 7 == 2:
            size, start = _read_varint(message, at)
            at = start + size
        else:
            at += {1: 8, 5: 4}[tag & 7]
        if at > len(message):
            raise ValueError("the file ends within a field")
        yield tag >> 3, value, start, at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def varint(value: int) -> bytes:
    """Return protocol buffers' encoding of a number from 0 to 2^64 - 1."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
