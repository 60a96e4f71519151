"""A tokenizer from ``tokenizer.json`` and the files beside it."""

import json
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.notes import note

from ..common.native_stderr import silenced
from .gpt2 import EncodingError, byte_spelling, guarded
from .prefix_space import parts
from .settings import FLAGS, AddedToken, TokenizerSettings
from .tokenizer import MARKED, Tokenizer, import_library

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte's piece, for characters that have none


class Json(Tokenizer):
    """A ``tokenizer.json`` with the tokens that the files beside it add, by the tokenizers library.

    The library gets its special tokens, and what is marked like one (``<|im_start|>`` is not
    always called special), under names with a random word in front that nobody can guess, so that
    no text spells one by accident or on purpose. It gets the text between special tokens alone,
    behind an added token of random letters that stands for the one before: what it finds first.
    One that the model makes of text by itself (``ordinary``) keeps its name, and text its ids.
    """

    def __init__(self, path: Path, content: dict[str, Any], settings: TokenizerSettings) -> None:
        library = import_library("tokenizers", path)
        self.path = path
        self.word = secrets.token_hex(8)
        try:
            added = _all_added(content, settings, path)
            ordinary = _ordinary(content, settings, {t["content"] for t in added if t["special"]})
            listed = {t["content"]: t["id"] for t in added if t["content"] in ordinary}
            added = [t for t in added if t["content"] not in ordinary]
            flags = {flag: {t["content"] for t in added if t.get(flag)} for flag in FLAGS}
            hidden = {t["content"] for t in added if t["special"]}
            guarded_names = hidden | {t["content"] for t in added if MARKED.fullmatch(t["content"])}
            renamed = _renamed({**content, "added_tokens": added}, guarded_names, self.word)
            with guarded("tokenizers"), silenced():
                self.tokenizer = library.Tokenizer.from_str(json.dumps(renamed))
            self.tokenizer.no_truncation()  # of the training that made it
            self.tokenizer.no_padding()
            special = {t["content"]: t["id"] for t in added if t["content"] in guarded_names}
            listed |= special
            prefix = _prefix(content.get("post_processor"))
        except Exception as error:  # the library raises bare exceptions
            if isinstance(error, InputError) and not isinstance(error, EncodingError):
                raise
            raise InputError(f"{path}: not a tokenizer ({error}); copy it again") from None
        for name, id_ in listed.items():
            known = name if name in ordinary else self.word + name
            if self.tokenizer.token_to_id(known) != id_:
                raise InputError(f"{path}: {name!r} cannot have id {id_}; correct its added tokens")
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        n_ids = max(vocab.values(), default=-1) + 1
        super().__init__(listed, n_ids, [special[n] for n in hidden])
        self.ordinary = ordinary
        self.prefix = prefix
        self.single_words = flags["single_word"] & set(special)
        self.normalized = flags["normalized"] & set(special)
        self.lstrip = {special[name] for name in flags["lstrip"] & set(special)}
        self.rstrip = {special[name] for name in flags["rstrip"] & set(special)}
        try:
            with guarded("tokenizers"), silenced():
                self._add_anchors(library, path)
        except EncodingError as error:
            raise InputError(f"{path}: not a tokenizer ({error}); copy it again") from None

    def _add_anchors(self, library: Any, path: Path) -> None:
        """Add the tokens that text is encoded behind: text after a normalized token, or another.

        Raises InputError where the normalizer, which sees the former, does not leave it.
        """
        self.anchors = {}
        for normalized in (False, True):
            name = secrets.token_hex(8) + "0"  # no mark composes with a digit
            token = library.AddedToken(name, normalized=normalized, special=True)
            self.tokenizer.add_special_tokens([token])
            self.anchors[normalized] = (name, self.tokenizer.token_to_id(name))
        normalizer = self.tokenizer.normalizer
        if not self.normalized or normalizer is None:
            return
        name, token = self.anchors[True][0], min(self.normalized)
        if name not in normalizer.normalize_str(name):
            raise InputError(
                f"{path}: {token!r} is normalized, and the normalizer does not leave letters and "
                "digits as they are; set the token's normalized to false"
            )
        if normalizer.normalize_str(token) not in normalizer.normalize_str("x" + token):
            note(
                f"{path}: {token!r} is placed wherever a template writes it (transformers 4 finds "
                "it after a space alone, as it is normalized)"
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        with guarded("tokenizers", text), silenced():
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary ids; raise InputError where the file's decoder fails."""
        try:
            with guarded("tokenizers"), silenced():
                return str(self.tokenizer.decode(list(ids))).replace(self.word, "")
        except EncodingError as error:
            raise InputError(f"{self.path}: its decoder fails ({error}); copy it again") from None

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of text and special tokens, which have their flags."""
        ids: list[int] = []
        before: int | None = None
        for part in self.stripped(parts):
            if isinstance(part, int):
                ids.append(part)
                before = part
            elif before is None:
                ids += self.encode(part)
            else:
                ids += self._encode_after(part, self.names[before] in self.normalized)
        return ids

    def _encode_after(self, text: str, normalized: bool) -> list[int]:
        """Return the ids of text that stands after a special token, which may be normalized."""
        name, id_ = self.anchors[normalized]
        ids = self.encode(name + text)
        if ids[:1] != [id_]:
            raise EncodingError(f"the normalizer changes what stands before {text[:20]!r}")
        return ids[1:]


def _all_added(
    content: dict[str, Any], settings: TokenizerSettings, path: Path
) -> list[dict[str, Any]]:
    """Return the added tokens of a ``tokenizer.json`` and of the files beside it, all with ids.

    A name that the vocabulary has keeps its id there; a new one has the next. Raises InputError for
    an id that a file says and the tokenizer cannot give.
    """
    added = [dict(token) for token in content.get("added_tokens") or []]
    vocab = _vocabulary(content["model"])
    ids = vocab | {token["content"]: token["id"] for token in added}
    is_added = {token["content"] for token in added}
    new = sorted(settings.added.values(), key=lambda t: (t.id is None, t.id))
    # BOS, EOS and others may be named and nothing more.
    named = [name for name in settings.roles.values() if name in vocab]
    new += [AddedToken(name, None) for name in named if name not in is_added]
    for token in new:
        id_ = ids.get(token.content, max(ids.values(), default=-1) + 1)
        if token.id not in (None, id_):
            raise InputError(
                f"{token.source}: {token.content!r} has id {token.id}, and {path.name} gives it "
                f"{id_}; correct one of them"
            )
        if token.content in is_added:
            if settings.has_decoder and token.id is not None:
                _follow(token, added)
        else:
            added.append(token.to_json(id_))
            ids[token.content] = id_
            is_added.add(token.content)
    return added


def _follow(token: AddedToken, added: list[dict[str, Any]]) -> None:
    """Give a ``tokenizer.json``'s token its flags in added_tokens_decoder; it stays special."""
    for own in added:
        if own["content"] == token.content:
            is_special = own.get("special") or token.flags.get("special")
            own |= {**token.to_json(own["id"]), "special": bool(is_special)}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Return the ids of a model's own tokens."""
    vocab = model.get("vocab", {})
    return vocab if isinstance(vocab, dict) else {name: i for i, (name, _) in enumerate(vocab)}


def _ordinary(
    content: dict[str, Any], settings: TokenizerSettings, names: Collection[str]
) -> set[str]:
    """Return those of some names that the model itself makes of text.

    They are its base symbols (letters, bytes), and other pieces that are not ``MARKED``: in BPE
    those that a merge makes; in other models, where trainers put special tokens among the pieces,
    those that no file lists as added.
    """
    model = content["model"]
    vocab = _vocabulary(model)
    prefix, suffix = (
        model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    steps = [*parts(content.get("pre_tokenizer")), *parts(content.get("normalizer"))]
    is_bytes = any(step.get("type") == "ByteLevel" for step in steps)
    if "merges" not in model:
        listed = {t["content"] for t in content.get("added_tokens") or []}
        words = set(vocab) - listed - set(settings.added)
    elif model.get("ignore_merges"):
        words = set(vocab)
    else:
        words = {a + b.removeprefix(prefix) for a, b in _pairs(model)}

    def is_base_symbol(name: str) -> bool:
        letter = name.removeprefix(prefix).removesuffix(suffix) or name
        is_byte = bool(model.get("byte_fallback")) and BYTE.fullmatch(name)
        return bool(is_byte) or (letter in byte_spelling() if is_bytes else len(letter) == 1)

    return {
        name
        for name in names
        if name in vocab
        and (is_base_symbol(name) or (name in words and not MARKED.fullmatch(name)))
    }


def _pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a model merges; older files have the two parts in one string."""
    for merge in model.get("merges") or ():
        a, b = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield a, b


def _renamed(content: dict[str, Any], special: set[str], word: str) -> dict[str, Any]:
    """Return the file's content with ``word`` before every special token's name.

    Merges that make such a token of text are left out.
    """

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
    if model.get("merges"):
        model["merges"] = [[a, b] for a, b in _pairs(model) if special.isdisjoint((a, b, a + b))]
    # Its flags are followed where it is placed; no text has this name.
    plain = dict.fromkeys([flag for flag in FLAGS if flag != "special"], False)
    added = [
        {**t, **plain, "content": new(t["content"])} if t["content"] in special else t
        for t in content.get("added_tokens") or []
    ]
    return {**content, "model": model, "added_tokens": added}


def _prefix(processor: Any) -> tuple[int, ...]:
    """Return the ids that a ``tokenizer.json``'s post-processor puts before any text."""
    if not isinstance(processor, dict):
        return ()
    ids: list[int] = []
    for inner in processor.get("processors", ()):
        ids = [*_prefix(inner), *ids]
    for piece in processor.get("single", ()):
        if "SpecialToken" not in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        ids.append(processor["cls"][1])
    return tuple(ids)
