"""The GPT-2 encoding, from ranks the package carries, and its Hugging Face files."""

import base64
import hashlib
import itertools
import json
from functools import lru_cache
from importlib import resources

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from .config import InputError

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257


def _ranks() -> dict[bytes, int]:
    """Read the merge ranks; refuse a damaged file, which would shift every id after it."""
    raw = (resources.files("llama_torch.assets") / "gpt2.tiktoken").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != RANKS_SHA256:
        raise InputError(
            f"llama_torch/assets/gpt2.tiktoken: sha256 is {digest}, should be {RANKS_SHA256}; "
            "install the package again"
        )
    pairs = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@lru_cache(maxsize=1)
def gpt2() -> tiktoken.Encoding:
    """Return tiktoken's GPT-2 encoding, without the network."""
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=_ranks(),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )


@lru_cache(maxsize=1)
def hf_files() -> dict[str, str]:
    """Return the files from which ``transformers.AutoTokenizer`` builds the same encoding."""
    special = {
        "id": END_OF_TEXT_ID,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level |= {"use_regex": True}
    ranks = _ranks()
    spell = _byte_spelling()
    vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    merges = [
        ["".join(spell[b] for b in part) for part in _last_merge(token, ranks)]
        for token in ranks
        if len(token) > 1
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab | {END_OF_TEXT: END_OF_TEXT_ID},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def _byte_spelling() -> list[str]:
    """Return GPT-2's printable character for each byte (Radford et al. 2019, section 2.2).

    Printable Latin-1 bytes stand for themselves; the others take 256, 257, ... in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose merge makes ``token``: apply all merges of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
