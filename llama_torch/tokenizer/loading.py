"""Load the tokenizer of a checkpoint, whichever of three kinds its directory holds."""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.files import read_json
from .gpt2 import END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, hf_files
from .tokenizer import Gpt2, Json, SentencePiece, Tokenizer


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
    """Return BOS and EOS by name, and tokens added, from the files beside a tokenizer."""
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
    """Set BOS and EOS by name. A tokenizer.json itself says whether BOS goes first."""
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
