"""The tokenizer's files of Hugging Face's form, from a GGUF file's metadata tokenizer.ggml.*."""

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_common.errors import InputError
from llama_common.notes import note
from llama_torch.tokenizer.pieces import UNKNOWN, varint

from .gguf_file import GgufFile
from .gguf_tokenizer import BPE, CONTROL, PRE, UNUSED, USER_DEFINED
from .token_ids import BOS, EOS, PAD, TokenIds

KEYS = "tokenizer.ggml."
SAME_PRE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
PADDING = re.compile(r"\[PAD[0-9]+\]")  # of ids without a token


def token_ids_of(file: GgufFile, vocab_size: int) -> TokenIds:
    """Return the ids of BOS, EOS and padding; InputError beyond the vocabulary."""
    found: dict[str, list[int]] = {BOS: [], EOS: [], PAD: []}
    for name, key in (("bos", BOS), ("eos", EOS), ("eot", EOS), ("eom", EOS), ("padding", PAD)):
        value = file.metadata.get(f"{KEYS}{name}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise InputError(
                f"{file.path}: {KEYS}{name}_token_id {_cut(value)} is no token of the vocabulary "
                f"of {vocab_size}; correct it"
            )
        found[key].append(value)
    ids = {key: sorted(set(values)) for key, values in found.items() if values}
    return {key: values if len(values) > 1 else values[0] for key, values in ids.items()}


def tokenizer_files(file: GgufFile, vocab_size: int, max_seq_len: int) -> dict[str, bytes]:
    """Return the content of the tokenizer's files by name; {} of a file without a tokenizer.

    A tokenizer of another kind is noted and left out. Raises InputError for lists of wrong lengths.
    """
    kind = file.metadata.get(f"{KEYS}model")
    if kind in (None, "none", "no_vocab"):
        return {}
    pre = file.metadata.get(f"{KEYS}pre", "")
    pre = SAME_PRE.get(pre, pre) if isinstance(pre, str) else ""
    if kind != "llama" and (kind != "gpt2" or pre not in PRE):
        note(
            f"{file.path}: its tokenizer ({_cut(kind)}, {_cut(pre)}) is not carried over; copy the "
            "files of the model's Hugging Face directory"
        )
        return {}
    tokens, kinds = _tokens(file, vocab_size)
    while tokens and kinds[-1] == UNUSED and PADDING.fullmatch(tokens[-1]):
        tokens, kinds = tokens[:-1], kinds[:-1]
    settings = _settings(file, kind, tokens, max_seq_len)
    if kind == "llama":
        files = {"tokenizer.model": _pieces_model(file, tokens, kinds)}
    else:
        text = json.dumps(_json(file, pre, tokens, kinds, settings), ensure_ascii=False)
        files = {"tokenizer.json": text.encode()}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n"}


def _cut(value: Any) -> str:
    return "a list" if isinstance(value, list | np.ndarray) else repr(value)[:60]


def _tokens(file: GgufFile, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = file.metadata.get(f"{KEYS}tokens")
    kinds = file.metadata.get(f"{KEYS}token_type", np.ones(vocab_size, np.int32))
    for name, values in (("tokens", tokens), ("token_type", kinds)):
        if not isinstance(values, list | np.ndarray) or len(values) != vocab_size:
            raise InputError(
                f"{file.path}: {KEYS}{name} is no list of {vocab_size}, as long as the vocabulary; "
                "convert the model anew"
            )
    assert isinstance(tokens, list | np.ndarray)
    return [str(token) for token in tokens], [int(kind) for kind in kinds]


def _settings(file: GgufFile, kind: str, tokens: list[str], max_seq_len: int) -> dict[str, Any]:
    """Return tokenizer_config.json but for the template."""
    is_slow = kind == "llama"
    found: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if is_slow else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id_ = file.metadata.get(f"{KEYS}{name}_token_id")
        if type(id_) is int and 0 <= id_ < len(tokens):
            found[f"{role}_token"] = tokens[id_]
    if is_slow:
        found |= {"legacy": True, "add_bos_token": _says(file, "add_bos_token", True)}
        if not _says(file, "add_space_prefix", True):
            found["add_prefix_space"] = False
    if _says(file, "add_eos_token", False):
        note(f"{file.path}: {KEYS}add_eos_token is not carried over: a prompt is continued")
    return found


def _says(file: GgufFile, key: str, default: bool) -> bool:
    return bool(file.metadata.get(f"{KEYS}{key}", default))


def _pieces_model(file: GgufFile, tokens: list[str], kinds: list[int]) -> bytes:
    """Return SentencePiece's model file: its pieces, and the settings that Llama 2's has."""
    scores = file.metadata.get(f"{KEYS}scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(tokens):
        raise InputError(f"{file.path}: {KEYS}scores is no list as long as its tokens; convert it")
    parts = []
    for token, score, kind in zip(tokens, scores.tolist(), kinds, strict=False):
        text = token.encode()
        piece = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        piece += b"\x18" + varint(kind & 0x7F)
        parts.append(b"\x0a" + varint(len(piece)) + piece)
    trainer = {3: BPE, 4: len(tokens), 35: 1}  # with pieces for bytes
    for name, number in (("unknown", 40), ("bos", 41), ("eos", 42), ("padding", 43)):
        id_ = file.metadata.get(f"{KEYS}{name}_token_id")
        trainer[number] = id_ if type(id_) is int and 0 <= id_ < len(tokens) else -1
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
    merges = file.metadata.get(f"{KEYS}merges", [])
    if not isinstance(merges, list):
        raise InputError(f"{file.path}: {KEYS}merges is no list of pairs; convert the model anew")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kinds[i] == CONTROL} for i in special
    ]
    # Behind the others they are no part of the vocabulary, as in Llama 3's file.
    n_own = len(tokens) - len(special)
    is_tail = special == list(range(n_own, len(tokens)))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pretokenizers = [
        step | {"trim_offsets": False} if "use_regex" in step else step for step in steps
    ]
    sequence = {"type": "Sequence", "pretokenizers": pretokenizers}
    bos = str(settings.get("bos_token", ""))
    has_bos = bos in tokens and _says(file, "add_bos_token", whole)
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
            "vocab": {token: i for i, token in enumerate(tokens[:n_own] if is_tail else tokens)},
            "merges": [str(pair) for pair in merges],
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
