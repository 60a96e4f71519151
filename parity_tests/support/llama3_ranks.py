"""A small ``tokenizer.model`` of Llama 3's form, and tiktoken's encoding of its ranks."""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tiktoken
import torch

from llama_torch.tokenizer.gpt2 import gpt2
from reference_np.config import LlamaConfig

from .meta_checkpoints import LLAMA3_SCALING, Cut, meta_params, meta_tensors, write_meta

# Copied from the model's card, not imported from the converter.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_RANKS = 2000
N_SPECIAL = 256


def gpt2_ranks(n: int = N_RANKS) -> dict[bytes, int]:
    """Return the first ``n`` tokens of GPT-2 and their ranks, a smaller vocabulary."""
    encoding = gpt2()
    return {encoding.decode_single_token_bytes(rank): rank for rank in range(n)}


def with_tokens(tokens: Iterable[bytes]) -> dict[bytes, int]:
    """Return the ranks of all single bytes, then of these tokens."""
    singles = [bytes([byte]) for byte in range(256)]
    return {token: rank for rank, token in enumerate(dict.fromkeys([*singles, *tokens]))}


def encoding(ranks: Mapping[bytes, int]) -> tiktoken.Encoding:
    """Return tiktoken's encoding of these ranks, without special tokens."""
    return tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={}
    )


def lines(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a tokenizer.model with these ranks."""
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in ranks.items())


def a_llama3(folder: Path, ranks: Mapping[bytes, int], scaled: bool = False) -> Path:
    """Write a checkpoint of Meta's form whose tokenizer.model has these ranks.

    With scaled rotary frequencies it is a Llama 3.1, else a Llama 3. As released, no file of it
    tells the special tokens' ids.
    """
    scaling = {"rope_factor": 8.0, **LLAMA3_SCALING} if scaled else {}
    config = LlamaConfig(24, 1, 6, 2, 4, 40, len(ranks) + N_SPECIAL, rope_theta=5e5, **scaling)
    tensors = meta_tensors(Cut(config, torch.float32, 1, 0))
    write_meta(folder, meta_params(config), tensors, 1, 0)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(lines(ranks))
    return folder


def token_ids(folder: Path) -> list[dict[str, object]]:
    """Return the special tokens' ids of config.json, and those of generation_config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    files = (folder / "config.json", folder / "generation_config.json")
    contents = [json.loads(path.read_text()) for path in files]
    return [{name: content[name] for name in names if name in content} for content in contents]
