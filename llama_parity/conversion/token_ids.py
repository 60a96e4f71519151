"""The ids of BOS, EOS and padding: what the files of a checkpoint, or flags, tell of them.

Readers of config.json that find none take 1 and 2, which are ordinary words of most vocabularies:
a text would never end, or end at a word.
"""

from pathlib import Path
from typing import Any

from llama_common.errors import InputError, flag_of
from llama_common.files import read_json, write_json
from llama_common.notes import note
from llama_torch.checkpoint.file_names import GENERATION_FILE
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.pieces import SentencePiece, is_ranks

from . import llama3_tokenizer as llama3

BOS, EOS, PAD = TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA_2 = {BOS: 1, EOS: 2}  # SentencePiece's own defaults
LLAMA_2_VOCAB = 32_000

TokenIds = dict[str, Any]  # an id, a list of ids (EOS), or None where the tokenizer has none


def ids_of_flags(bos: int, eos: tuple[int, ...], vocab_size: int) -> TokenIds:
    """Return the ids that flags tell: -1 and () tell none. InputError beyond the vocabulary."""
    ids: TokenIds = {} if bos < 0 else {BOS: bos}
    if eos:
        ids[EOS] = _one_or_list(eos)
    for key, value in ids.items():
        _require_known(value, vocab_size, flag_of(key), "give one of its ids")
    return ids


def ids_of_files(folder: Path, vocab_size: int) -> TokenIds:
    """Return the ids that generation_config.json and, before it, config.json tell.

    Raises InputError for BOS and EOS beyond the vocabulary; padding there is left out and noted.
    """
    ids: TokenIds = {}
    for name in (GENERATION_FILE, "config.json"):
        path = folder / name
        known = read_json(path) if path.is_file() else {}
        for key in TOKEN_IDS:
            if (value := known.get(key)) in (None, []):
                continue
            if key == PAD and not _is_known(value, vocab_size):
                note(f"{path}: {key} {value!r} is no token of the model's, and is left out")
                continue
            if key == BOS and isinstance(value, list):
                raise InputError(f"{path}: {key} is a list; give one id")
            _require_known(value, vocab_size, f"{path}: {key}", "correct it")
            ids[key] = value
    return ids


def complete_ids(ids: TokenIds, folder: Path, config: ModelConfig, by_size: bool) -> TokenIds:
    """Return ids, which files and flags tell, and beside them those that the tokenizer does.

    ``by_size``: where there is no tokenizer, a vocabulary of Llama 2's or 3's size tells them.
    Meta's form has no other place for them; Hugging Face's has, and left them out.
    """
    if BOS in ids and EOS in ids:
        return ids
    sized = _ids_of_vocabulary(folder, config) if by_size else {}
    return sized | _ids_of_tokenizer(folder, config) | ids


def require_ids(ids: TokenIds, filed: TokenIds, folder: Path) -> None:
    """Raise InputError that asks for flags where no end token is told.

    No BOS is good enough where the files that tell an end token have none.
    """
    if EOS not in ids or (BOS not in ids and EOS not in filed):
        flags = [flag_of(key) for key in (EOS, BOS) if key not in ids]
        raise InputError(
            f"{folder}: no file tells which token ends a text or begins one; give "
            f"{' and '.join(flags)}, or put the checkpoint's tokenizer there"
        )


def _ids_of_vocabulary(folder: Path, config: ModelConfig) -> TokenIds:
    """Return what the size tells where there is no tokenizer."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    if config.vocab_size == LLAMA_2_VOCAB:
        return LLAMA_2
    return _ids_of_ranks(config) if config.vocab_size == llama3.VOCAB_SIZE else {}


def _ids_of_ranks(config: ModelConfig) -> TokenIds:
    """Return the ids that Meta's names have after Llama 3's ranks."""
    special = llama3.special_tokens(config, config.vocab_size - llama3.N_SPECIAL)
    ends = [special[name] for name in llama3.ENDS if name in special]
    pad = {PAD: special[llama3.PAD]} if llama3.PAD in special else {}
    return {BOS: special[llama3.BOS], EOS: _one_or_list(ends)} | pad


def _ids_of_tokenizer(folder: Path, config: ModelConfig) -> TokenIds:
    """Return what tokenizer.json tells, or else tokenizer.model; BOS None where it has none."""
    pieces = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").is_file():
        if not pieces.is_file():
            return {}
        if is_ranks(pieces):
            return _ids_of_ranks(config)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    special = tokenizer.special
    ends = [special[name] for name in (tokenizer.eos, *llama3.ENDS) if name in special]
    if not ends:
        return {}
    ids: TokenIds = {BOS: special.get(tokenizer.bos or llama3.BOS), EOS: _one_or_list(ends)}
    pad = special.get(tokenizer.others.get("pad_token", llama3.PAD), -1)
    if isinstance(tokenizer, SentencePiece) and pad < 0:
        pad = tokenizer.processor.pad_id()
    return ids | ({PAD: pad} if pad >= 0 else {})


def write_generation_config(folder: Path, ids: TokenIds, flagged: TokenIds) -> None:
    """Add to a folder's generation_config.json the ids that it does not tell or flags replace."""
    path = folder / GENERATION_FILE
    known = read_json(path) if path.is_file() else {}
    # Its own end tokens may be others than config.json's; its padding may be left out.
    own = {k: v for k, v in known.items() if k not in flagged and k != PAD and v is not None}
    if known != (content := ids | own):
        write_json(path, content)


def _one_or_list(ids: Any) -> int | list[int]:
    found = sorted(set(ids))
    return found[0] if len(found) == 1 else found


def _is_known(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _require_known(value: Any, vocab_size: int, source: str, remedy: str) -> None:
    for id_ in value if isinstance(value, list) else [value]:
        if not _is_known(id_, vocab_size):
            raise InputError(
                f"{source} {id_!r} is no token of the vocabulary of {vocab_size}; {remedy}"
            )
