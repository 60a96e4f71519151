"""Folders of tokenizers beside transformers' reading of them; skips where it is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from llama_common.files import write_json
from llama_torch.tokenizer.chat_template import load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer

transformers = pytest.importorskip("transformers")

VOCAB = 999
IS_V4 = transformers.__version__.startswith("4.")
ASCII = [chr(i) for i in range(33, 127)]
SAYING = "{% for m in messages %}{{ bos_token }}{{ m['content'] }} {{ eos_token }}{% endfor %}"


def flagged(content: str, **flags: bool) -> dict[str, Any]:
    """Return an added token; flags that are not given are false."""
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, "special": True, **dict.fromkeys(names, False), **flags}


def their_ids(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation [n_tokens] by transformers."""
    found = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = found.apply_chat_template(messages, return_dict=True)["input_ids"]
    return ids


def our_ids(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation [n_tokens] by this program."""
    return load_chat_template(folder, load_tokenizer(folder, VOCAB)).encode(messages)


def write_spaced(folder: Path, normalizer: Any = None, **flags: bool) -> None:
    """Write a tokenizer.json in Llama 2's older shape: its normalizer puts a word's space first."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *ASCII]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizer or normalizers.Sequence(spaces)
    replaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replaced.append(decoders.Strip(" ", left=1))
    made.decoder = decoders.Sequence(replaced)
    content = json.loads(made.to_str())
    content["added_tokens"] = [{"id": i, **flagged(names[i], **flags)} for i in range(3)]
    write_json(folder / "tokenizer.json", content)


def settings(source: str, kind: str = "LlamaTokenizer", **others: Any) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json with a chat template."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    return {"tokenizer_class": kind, **names, "chat_template": source, **others}
