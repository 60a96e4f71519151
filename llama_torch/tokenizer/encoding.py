"""The encoding of a training text: a tokenizer, and the ids that begin and end each document."""

import functools
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_common.errors import InputError
from llama_common.files import read_json

from .gpt2 import END_OF_TEXT_ID, RANKS_SHA256
from .settings import ADDED, CONFIG, MAP

if TYPE_CHECKING:  # commands that encode nothing do without the tokenizers' libraries
    from .tokenizer import Tokenizer

# Characters to encode the rest of a document behind: the first that no piece joins to it is taken.
ANCHORS = "a\n.字"
UNKNOWN_VOCABULARY = 2**31  # of a directory without a model: any id is below it


@dataclass(frozen=True)
class TextEncoding:
    """How documents become one sequence of ids: each is ``begin``, its text's ids, ``eos_id``.

    ``begin`` is the BOS of a model that was trained with one (Llama 2, Llama 3), or nothing.
    """

    name: str  # of the tokenizer, for messages
    sha256: str  # of what determines the ids
    begin: tuple[int, ...]
    eos_id: int
    directory: str = ""  # of the tokenizer's files; empty = GPT-2's, of this package
    vocab_size: int = 0  # of the model there

    @property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, loaded once in a process."""
        return self.load()

    def load(self) -> "Tokenizer":
        """Return the tokenizer; processes forked later share its memory."""
        return _load(self.directory, self.vocab_size, self.sha256)

    @property
    def flag(self) -> str:
        """The flag of ``python -m llama_torch.prepare`` that names the tokenizer, if any."""
        return f" --tokenizer {shlex.quote(self.directory)}" if self.directory else ""

    def document_ids(self, text: str, is_start: bool = True, is_end: bool = True) -> list[int]:
        """Return the ids of a document that is not empty, or of a part that may not be its start.

        Raises EncodingError where the tokenizer's library panics.
        """
        ids = self.tokenizer.encode(text) if is_start else self._continuation_ids(text)
        if is_start and is_end and not ids:
            return []
        return [*self.begin * is_start, *ids, *[self.eos_id] * is_end]

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a document's beginning, to be continued."""
        return [*self.begin, *self.tokenizer.encode(text)]

    def _continuation_ids(self, text: str) -> list[int]:
        """Return the ids of the rest of a document, without a space that a tokenizer puts first."""
        if not self.directory:  # GPT-2's pieces look at nothing before a border
            return self.tokenizer.encode(text)
        for anchor in ANCHORS:
            before, ids = self.tokenizer.encode(anchor), self.tokenizer.encode(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.tokenizer.encode(text)


GPT2 = TextEncoding("GPT-2's", RANKS_SHA256, (), END_OF_TEXT_ID)


@functools.cache
def _load(directory: str, vocab_size: int, sha256: str) -> "Tokenizer":
    """Return the tokenizer of a directory's files, whose hash is part of the cache's key."""
    from .loading import load_tokenizer
    from .tokenizer import Gpt2

    return load_tokenizer(Path(directory), vocab_size) if directory else Gpt2()


def load_encoding(ckpt: Path, vocab_size: int = UNKNOWN_VOCABULARY) -> TextEncoding:
    """Return the encoding of a model directory (or of a file's) whose model has that vocabulary.

    Raises InputError for a tokenizer that cannot be read or names no end of a text.
    """
    from .tokenizer import Gpt2

    folder = ckpt if ckpt.is_dir() else ckpt.parent
    sha256 = _hash(folder)
    tokenizer = _load(str(folder), vocab_size, sha256)
    if isinstance(tokenizer, Gpt2):
        return GPT2
    if tokenizer.eos is None:
        raise InputError(
            f"{folder}: its tokenizer names no eos_token, which ends a document of a training "
            "text; name it in tokenizer_config.json"
        )
    eos_id = tokenizer.special[tokenizer.eos]
    name = f"{folder}'s"
    return TextEncoding(name, sha256, tokenizer.prefix, eos_id, str(folder), vocab_size)


def _hash(folder: Path) -> str:
    """Return the hash of the files that determine ids; a chat template does not."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model"):  # the first of them is read
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(name.encode() + hashlib.sha256(content).digest())
            break
    for name in (CONFIG, MAP, ADDED):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            settings.pop("chat_template", None)
            digest.update(f"{name} {json.dumps(settings, sort_keys=True)}".encode())
    return digest.hexdigest()
