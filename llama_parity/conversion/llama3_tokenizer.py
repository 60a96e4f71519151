"""Llama 3's tokenizer: from Meta's ``tokenizer.model`` to ``tokenizer.json``, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.gpt2 import spelled_bytes, vocab_and_merges

from .token_ranks import ranks_text, read_ranks

N_SPECIAL = 256
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
# Of Meta's names for special tokens, those after which its programs stop.
ENDS = (EOS, "<|eom_id|>", "<|eot_id|>")
VOCAB_SIZE = 128_256  # of every Llama 3, its 256 special tokens included
# How Llama 3 cuts a text into the pieces that are encoded one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Special tokens by their place after the ranks; the rest are reserved.
LLAMA_3 = {
    **{0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"},
}
LLAMA_31 = LLAMA_3 | {4: PAD, 8: "<|eom_id|>", 10: "<|python_tag|>"}


def special_tokens(config: ModelConfig, n_ranks: int) -> dict[str, int]:
    """Return the 256 special tokens' ids, which follow the ranks.

    Llama 3.1 and its successors, which scale the rotary frequencies, name three more than Llama 3.
    """
    named = LLAMA_31 if config.rope_type == "llama3" else LLAMA_3
    reserved = [place for place in range(N_SPECIAL) if place not in named]
    names = named | {p: f"<|reserved_special_token_{i}|>" for i, p in enumerate(reserved)}
    return {names[place]: n_ranks + place for place in range(N_SPECIAL)}


def hf_tokenizer(path: Path, config: ModelConfig) -> dict[str, str]:
    """Return the text, by name, of the files that say in Hugging Face's form what ``path`` does.

    Raises InputError for a damaged file, and one that does not fit the model's vocabulary.
    """
    ranks = read_ranks(path)
    special = special_tokens(config, len(ranks))
    if len(ranks) + N_SPECIAL != config.vocab_size:
        raise InputError(
            f"{path}: has {len(ranks)} ranks, to which {N_SPECIAL} special tokens are added, and "
            f"the model a vocabulary of {config.vocab_size}; copy the checkpoint's own file again"
        )
    if taken := [name for name in special if name.encode() in ranks]:
        raise InputError(f"{path}: {taken[0]} is a token of text there; copy the file again")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": BOS, "eos_token": EOS}
    settings |= {"pad_token": PAD} if PAD in special else {}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": config.max_seq_len}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    return {
        "tokenizer.json": json.dumps(_tokenizer(ranks, special), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def meta_tokenizer(path: Path, config: ModelConfig) -> bytes | None:
    """Return the tokenizer.model of which ``path``, a tokenizer.json, is Hugging Face's form.

    None where it is another tokenizer's than a Llama 3's. It may list more merges for a token than
    its last: these pairs meet in no text. Raises InputError for a file that is not JSON.
    """
    content = read_json(path)
    try:
        ranks = _ranks(content["model"]["vocab"], config.vocab_size - N_SPECIAL)
        expected = _tokenizer(ranks, special_tokens(config, len(ranks)))
        wanted = expected["model"]["merges"]
        listed = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        kept = set(wanted)
        found = _outline(content) | {"merges": [merge for merge in listed if merge in kept]}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return ranks_text(ranks) if found == _outline(expected) | {"merges": wanted} else None


def _ranks(vocab: Mapping[str, int], n_ranks: int) -> dict[bytes, int]:
    """Return the ranks in order; KeyError or ValueError for those of no list of ranks."""
    byte_of = spelled_bytes()
    by_rank = {rank: bytes(byte_of[c] for c in token) for token, rank in vocab.items()}
    if len(vocab) != n_ranks:
        raise ValueError("another number of tokens")
    return {by_rank[rank]: rank for rank in range(n_ranks)}


def _outline(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides on the ids of a text, but for vocabulary and merges."""
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    model = content["model"]
    return {
        "split": {key: split[key] for key in ("type", "pattern", "behavior", "invert")},
        "bytes": {key: byte_level[key] for key in ("type", "add_prefix_space", "use_regex")},
        "normalizer": content.get("normalizer"),
        "model": (model["type"], model["ignore_merges"], model.get("dropout")),
        # Reserved ones are named otherwise here and there.
        "special": {name: id_ for name, id_ in added.items() if name in LLAMA_31.values()},
        "ids": sorted(added.values()),
    }


def _tokenizer(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> dict[str, Any]:
    """Return a tokenizer.json: a piece that is a token is that token, whatever its merges make."""
    vocab, merges = vocab_and_merges(ranks)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": False, "use_regex": False}
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": PATTERN}}
    split |= {"behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, **flags, "special": True} for name, id_ in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, _bos_first(special)]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def _bos_first(special: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts BOS before a text, and before the second of a pair."""

    def piece(kind: str, id_: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": id_, "type_id": type_id}}

    single = [piece("SpecialToken", BOS, 0), piece("Sequence", "A", 0)]
    pair = [*single, piece("SpecialToken", BOS, 1), piece("Sequence", "B", 1)]
    bos = {"id": BOS, "ids": [special[BOS]], "tokens": [BOS]}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {BOS: bos},
    }
