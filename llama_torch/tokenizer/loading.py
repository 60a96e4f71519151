"""Load the tokenizer of a checkpoint, whichever of three kinds its directory holds."""

import functools
import json
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json, require_name
from llama_common.notes import note

from .gpt2 import END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, hf_files
from .json_tokenizer import Json
from .pieces import SentencePiece
from .prefix_space import LLAMA, with_prefix_space
from .settings import AddedToken, TokenizerSettings, read_settings
from .tokenizer import Gpt2, Tokenizer


def load_tokenizer(ckpt: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model directory (or of a file's) whose model has that vocabulary.

    Raises InputError for files that cannot be read, ids beyond the vocabulary, special tokens
    that the tokenizer does not have, and a directory without a tokenizer whose vocabulary
    cannot be GPT-2's.
    """
    require_name(ckpt)
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    settings = read_settings(folder)
    tokenizer, source = _find_tokenizer(ckpt, folder, vocab_size, settings)
    _apply_roles(tokenizer, settings)
    _leave_out_padding(tokenizer, settings, vocab_size)
    if source.name == "tokenizer.json":
        _note_bos(tokenizer, source, settings)
    if settings.add_eos_token:
        note(f"{folder}: add_eos_token is not followed: a prompt is continued")
    if settings.clean_up_tokenization_spaces:
        note(
            f"{folder}: clean_up_tokenization_spaces is not done, as in transformers 5 "
            "(version 4 takes spaces before punctuation out of decoded text)"
        )
    if tokenizer.n_ids > vocab_size:
        raise InputError(
            f"{source}: has token id {tokenizer.n_ids - 1}, beyond the model's vocabulary of "
            f"{vocab_size}; it belongs to another checkpoint"
        )
    return tokenizer


def _find_tokenizer(
    ckpt: Path, folder: Path, vocab_size: int, settings: TokenizerSettings
) -> tuple[Tokenizer, Path]:
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        content, puts_a_token_last = _read_fast(fast, settings)
        if puts_a_token_last:
            note(f"{fast}: a token after a text is left out: a prompt is continued")
        if _is_gpt2(content) and not _added_to_gpt2(settings):
            return Gpt2(settings.roles.values()), fast
        return Json(fast, content, settings), fast
    if pieces.is_file():
        return SentencePiece(pieces, settings), pieces
    if not VOCAB_SIZE <= vocab_size < 2 * VOCAB_SIZE:
        raise InputError(
            f"{folder}: holds no tokenizer.json and no tokenizer.model, and a vocabulary of "
            f"{vocab_size} is not GPT-2's; copy the checkpoint's tokenizer there"
        )
    if added := _added_to_gpt2(settings):
        token = added[0]
        said = "" if token.id is None else f", as id {token.id}"
        raise InputError(
            f"{token.source}: adds {token.content!r}{said} to GPT-2's tokens, and {folder} "
            "holds no tokenizer.json that has it; copy the checkpoint's there"
        )
    return Gpt2(settings.roles.values()), ckpt


def _read_fast(path: Path, settings: TokenizerSettings) -> tuple[dict[str, Any], bool]:
    """Return a ``tokenizer.json``, spaced as its settings say, and whether it ends a text.

    Raises InputError for one whose steps are not as the tokenizers library writes them.
    """
    found = read_json(path)
    try:
        content = with_prefix_space(found, settings, path)
        return content, _puts_a_token_last(content.get("post_processor"))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise InputError(f"{path}: not a tokenizer ({error}); copy it again") from None


def _puts_a_token_last(processor: Any) -> bool:
    """Return whether a ``tokenizer.json``'s post-processor puts a token after a text."""
    if not isinstance(processor, dict):
        return False
    single = processor.get("single") or [{}]
    return (
        any(map(_puts_a_token_last, processor.get("processors", ())))
        or "SpecialToken" in single[-1]
        or processor.get("type") in ("BertProcessing", "RobertaProcessing")
    )


def _added_to_gpt2(settings: TokenizerSettings) -> list[AddedToken]:
    """Return the added tokens that are not GPT-2's own."""
    own = ((END_OF_TEXT, END_OF_TEXT_ID), (END_OF_TEXT, None))
    return [token for token in settings.added.values() if (token.content, token.id) not in own]


# What may differ from GPT-2's own file: no id and no text depends on it.
FREE_KEYS = {
    "file": ("truncation", "padding"),
    "model": ("unk_token", "fuse_unk", "byte_fallback"),  # every byte is in the vocabulary
    "pre_tokenizer": ("trim_offsets",),
    "decoder": ("add_prefix_space", "trim_offsets", "use_regex"),
    "added": ("normalized",),
}
# What the tokenizers library takes where a key is left out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"type": "BPE"},
    "pre_tokenizer": {"use_regex": True},
}


def _is_gpt2(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is GPT-2's encoding and nothing else."""
    try:
        if not VOCAB_SIZE - 1 <= len(content["model"]["vocab"]) <= VOCAB_SIZE:
            return False  # before the longer comparison, which most files need not wait for
        return _comparable(content) == _gpt2_json()
    except (KeyError, TypeError, AttributeError):
        return False


@functools.lru_cache(maxsize=1)
def _gpt2_json() -> dict[str, Any]:
    return _comparable(json.loads(hf_files()["tokenizer.json"]))


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json in the one form that all files of the same encoding have."""
    file = _cut(content, "file")
    model = _cut(content["model"], "model")
    model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    added = [_cut(token, "added") for token in content.get("added_tokens") or []]
    # The end token may stand in the vocabulary, among the added tokens, or in both.
    ids = {token["content"]: token["id"] for token in added}
    model["vocab"] = ids | model["vocab"]
    file["added_tokens"] = added or _gpt2_end()
    for part in ("pre_tokenizer", "decoder"):
        file[part] = _cut(content[part], part)
    if (file.get("post_processor") or {}).get("type") == "ByteLevel":
        del file["post_processor"]  # it changes offsets alone
    return file | {"model": model}


def _cut(part: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object without its free keys, and without those that are null, false or empty."""
    whole = DEFAULTS.get(name, {}) | part
    return {key: v for key, v in whole.items() if v and key not in FREE_KEYS[name]}


def _gpt2_end() -> list[dict[str, Any]]:
    return [{"id": END_OF_TEXT_ID, "content": END_OF_TEXT, "special": True}]


def _apply_roles(tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """Set BOS, EOS and the other tokens that templates know by name.

    Raises InputError for a BOS or EOS that is a piece of text: a message could begin or end a text.
    """
    for role in ("bos", "eos"):
        name = settings.roles.get(f"{role}_token")
        if name is not None and name not in tokenizer.special:
            raise InputError(
                f"{settings.folder}: {role}_token is {name!r} in tokenizer_config.json (or "
                "special_tokens_map.json), which the tokenizer does not have; correct one of them"
            )
        if name in tokenizer.ordinary:
            raise InputError(
                f"{settings.folder}: {role}_token is {name!r} in tokenizer_config.json (or "
                "special_tokens_map.json), an ordinary piece of the tokenizer, which any text may "
                "contain; name a special token"
            )
        setattr(tokenizer, role, name or getattr(tokenizer, role))
    for name in sorted(tokenizer.ordinary):
        note(
            f"{settings.folder}: {name!r} is named as a special token and is an ordinary piece of "
            "the tokenizer; text keeps it, and templates place it as a token"
        )
    others = settings.roles.items()
    tokenizer.others = {k: v for k, v in others if k not in ("bos_token", "eos_token")}


def _note_bos(tokenizer: Tokenizer, source: Path, settings: TokenizerSettings) -> None:
    """Note where a ``tokenizer.json`` puts BOS before a prompt and transformers 4 would not.

    Or the other way round: its Llama classes rebuild the post-processor from ``add_bos_token``,
    which is true unless said; its other classes and transformers 5 read the file.
    """
    wanted = settings.add_bos_token
    if wanted is None and settings.tokenizer_class in LLAMA:
        wanted = tokenizer.bos is not None
    has_bos = tokenizer.bos is not None and tokenizer.special[tokenizer.bos] in tokenizer.prefix
    if wanted is None or wanted == has_bos:
        return
    said = "" if settings.add_bos_token is None else f", whatever add_bos_token={wanted} says"
    note(
        f"{source}: its post-processor puts {'a' if has_bos else 'no'} BOS before a prompt, which "
        f"is followed as in transformers 5{said} (version 4 may differ)"
    )


def _leave_out_padding(tokenizer: Tokenizer, settings: TokenizerSettings, vocab_size: int) -> None:
    """Forget a pad token beyond the model's vocabulary, as fine-tuning scripts leave one.

    It stands for no text, and no row of the embedding was ever read for it.
    """
    name = settings.roles.get("pad_token", "")
    beyond = [n for n, id_ in tokenizer.special.items() if id_ >= vocab_size]
    if beyond == [name] and tokenizer.n_ids == vocab_size + 1:
        note(
            f"{settings.folder}: the pad token {name!r} has id {vocab_size}, beyond the model's "
            "vocabulary, and is left out"
        )
        del tokenizer.special[name]
        tokenizer.n_ids = vocab_size
