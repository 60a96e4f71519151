"""The tokenizer's files of Hugging Face's form, from a GGUF file's metadata tokenizer.ggml.*."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from llama_common.errors import InputError, flag_of
from llama_common.notes import note
from llama_torch.tokenizer.pieces import BYTE, UNKNOWN, varint

from .gguf_file import GgufFile, shown
from .gguf_tokenizer import BPE, CONTROL, NORMAL, PRE, UNUSED, USER_DEFINED
from .token_ids import BOS, EOS, PAD, TokenIds

KEYS = "tokenizer.ggml."
SAME_PRE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
PADDING = re.compile(r"\[PAD[0-9]+\]")  # of ids without a token


def token_ids_of(file: GgufFile, vocab_size: int, flagged: Collection[str] = ()) -> TokenIds:
    """Return the ids of BOS, EOS and padding, but for those that flags tell.

    Raises InputError for BOS and EOS beyond the vocabulary; padding there is left out and noted.
    """
    found: dict[str, list[int]] = {BOS: [], EOS: [], PAD: []}
    for name, key in (("bos", BOS), ("eos", EOS), ("eot", EOS), ("eom", EOS), ("padding", PAD)):
        value = file.get(f"{KEYS}{name}_token_id", int)
        if value is None or key in flagged:
            continue
        if 0 <= value < vocab_size:
            found[key].append(value)
            continue
        problem = f"{file.path}: {KEYS}{name}_token_id {value} is no token of the vocabulary"
        if key != PAD:
            raise InputError(f"{problem} of {vocab_size}; give {flag_of(key)}")
        note(f"{problem} of {vocab_size}, and is left out")
    ids = {key: sorted(set(values)) for key, values in found.items() if values}
    return {key: values if len(values) > 1 else values[0] for key, values in ids.items()}


def tokenizer_files(file: GgufFile, vocab_size: int, max_seq_len: int) -> dict[str, bytes]:
    """Return the content of the tokenizer's files by name; {} of a file without a tokenizer.

    A tokenizer of another kind is noted and left out. Raises InputError for lists of wrong lengths.
    """
    kind = file.get(f"{KEYS}model", str)
    if kind in (None, "none", "no_vocab"):
        return {}
    pre = file.get(f"{KEYS}pre", str) or ""
    pre = SAME_PRE.get(pre, pre)
    if kind != "llama" and (kind != "gpt2" or pre not in PRE):
        return _left_out(file, f"{shown(kind)}, {shown(pre)}")
    scores = file.get_list(f"{KEYS}scores", float, vocab_size) if kind == "llama" else []
    if scores is None:
        return _left_out(file, f"'llama', without {KEYS}scores")
    tokens, kinds = _tokens(file, vocab_size)
    while tokens and kinds[-1] == UNUSED and PADDING.fullmatch(tokens[-1]):
        tokens, kinds = tokens[:-1], kinds[:-1]
    if kind == "llama":
        flaw = _flaw_of_pieces(tokens, kinds)
    else:
        flaw = _flaw_of_json(tokens, kinds, file.get_list(f"{KEYS}merges", str) or [])
    if flaw:
        return _left_out(file, f"{shown(kind)}, with {flaw}")
    settings = _settings(file, kind, tokens, max_seq_len)
    if kind == "llama":
        files = {"tokenizer.model": _pieces_model(file, tokens, scores, kinds)}
    else:
        text = json.dumps(_json(file, pre, tokens, kinds, settings), ensure_ascii=False)
        files = {"tokenizer.json": text.encode()}
    template = file.get("tokenizer.chat_template", str)
    if template is not None:
        settings["chat_template"] = template
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n"}


def _left_out(file: GgufFile, what: str) -> dict[str, bytes]:
    note(
        f"{file.path}: its tokenizer ({what}) is not carried over; copy the files of the model's "
        "Hugging Face directory"
    )
    return {}


def _flaw_of_json(tokens: list[str], kinds: list[int], merges: list[str]) -> str:
    """Return what a tokenizer.json of bytes has no place for, "" of a whole vocabulary."""
    if len(set(tokens)) < len(tokens):
        return "a token that stands there twice"
    vocabulary = _own_tokens(tokens, kinds)
    for merge in merges:
        left, blank, right = merge.partition(" ")
        if not (blank and {left, right, left + right} <= vocabulary.keys()):
            return f"the merge {shown(merge)} of or into no token"
    return ""


def _flaw_of_pieces(tokens: list[str], kinds: list[int]) -> str:
    """Return what SentencePiece does not load, "" of a whole vocabulary."""
    if len(set(tokens)) < len(tokens):
        return "a token that stands there twice"
    if any(not token or "\0" in token for token in tokens):
        return "an empty token or one that holds a null character"
    if kinds.count(UNKNOWN) > 1 or not {UNKNOWN, BYTE} & {*kinds}:
        return "several unknown tokens, or none"
    found = sorted(token for token, kind in zip(tokens, kinds, strict=True) if kind == BYTE)
    is_whole = found in ([], [f"<0x{byte:02X}>" for byte in range(256)])
    return "" if is_whole else "some of the 256 tokens for bytes alone"


def _own_tokens(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Return the ids of a tokenizer.json's vocabulary.

    Special tokens behind the others are no part of it, as in Llama 3's file.
    """
    special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    n_own = len(tokens) - len(special)
    is_tail = special == list(range(n_own, len(tokens)))
    return {token: i for i, token in enumerate(tokens[:n_own] if is_tail else tokens)}


def _tokens(file: GgufFile, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the tokens and their kinds; one of no kind that SentencePiece knows is normal."""
    tokens = file.get_list(f"{KEYS}tokens", str, vocab_size)
    if tokens is None:
        raise InputError(f"{file.path}: {KEYS}tokens is missing; convert the model anew")
    kinds = file.get_list(f"{KEYS}token_type", int, vocab_size) or [NORMAL] * vocab_size
    return tokens, [kind if NORMAL <= kind <= BYTE else NORMAL for kind in kinds]


def _settings(file: GgufFile, kind: str, tokens: list[str], max_seq_len: int) -> dict[str, Any]:
    """Return tokenizer_config.json but for the template."""
    is_slow = kind == "llama"
    found: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if is_slow else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id_ = _known_id(file, name, tokens)
        if id_ >= 0:
            found[f"{role}_token"] = tokens[id_]
    if is_slow:
        found |= {"legacy": True, "add_bos_token": _says(file, "add_bos_token", True)}
        if not _says(file, "add_space_prefix", True):
            found["add_prefix_space"] = False
    if _says(file, "add_eos_token", False):
        note(f"{file.path}: {KEYS}add_eos_token is not carried over: a prompt is continued")
    return found


def _says(file: GgufFile, key: str, default: bool) -> bool:
    said = file.get(f"{KEYS}{key}", bool)
    return default if said is None else said


def _known_id(file: GgufFile, name: str, tokens: Sequence[str]) -> int:
    """Return the id of a special token, -1 of one that the file lacks or that is no token."""
    id_ = file.get(f"{KEYS}{name}_token_id", int)
    return id_ if id_ is not None and 0 <= id_ < len(tokens) else -1


def _pieces_model(
    file: GgufFile, tokens: list[str], scores: list[float], kinds: list[int]
) -> bytes:
    """Return SentencePiece's model file: its pieces, and the settings that Llama 2's has."""
    parts = []
    with np.errstate(over="ignore"):  # of numbers in double precision
        stored = np.array(scores, "<f4")
    for token, score, kind in zip(tokens, stored, kinds, strict=False):
        text = token.encode()
        piece = b"\x0a" + varint(len(text)) + text + b"\x15" + score.tobytes()
        piece += b"\x18" + varint(kind)
        parts.append(b"\x0a" + varint(len(piece)) + piece)
    trainer = {3: BPE, 4: len(tokens), 35: int(BYTE in kinds)}  # pieces for bytes
    for name, number in (("unknown", 40), ("bos", 41), ("eos", 42), ("padding", 43)):
        trainer[number] = _known_id(file, name, tokens)
    if trainer[40] < 0 and UNKNOWN in kinds:
        trainer[40] = kinds.index(UNKNOWN)
    normalizer = b"\x0a\x08identity" + _numbers({3: 1, 4: 0, 5: 1})
    settings = _numbers(trainer)
    content = b"".join(parts) + b"\x12" + varint(len(settings)) + settings
    return content + b"\x1a" + varint(len(normalizer)) + normalizer


def _numbers(fields: Mapping[int, int]) -> bytes:
    """Return protocol buffers' encoding of numbers by their fields."""
    pairs = (varint(number << 3) + varint(value % 2**64) for number, value in fields.items())
    return b"".join(pairs)


def _json(
    file: GgufFile, pre: str, tokens: list[str], kinds: list[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a tokenizer.json of bytes."""
    steps, whole = PRE[pre]
    merges = file.get_list(f"{KEYS}merges", str) or []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kinds[i] == CONTROL} for i in special
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pretokenizers = [
        step | {"trim_offsets": False} if "use_regex" in step else step for step in steps
    ]
    sequence = {"type": "Sequence", "pretokenizers": pretokenizers}
    bos = str(settings.get("bos_token", ""))
    has_bos = _says(file, "add_bos_token", whole) and bos in tokens
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": sequence if len(steps) > 1 else pretokenizers[0],
        "post_processor": _bos_first(bos, tokens.index(bos)) if has_bos else None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")),
            "end_of_word_suffix": None,
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": whole},
            "vocab": _own_tokens(tokens, kinds),
            "merges": merges,
        },
    }


def _bos_first(bos: str, id_: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before a text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": bos, "type_id": 1}}]
    pair.append({"Sequence": {"id": "B", "type_id": 1}})
    tokens = {bos: {"id": bos, "ids": [id_], "tokens": [bos]}}
    kind = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return kind | {"special_tokens": tokens}
