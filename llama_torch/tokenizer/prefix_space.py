"""The key ``add_prefix_space`` beside a ``tokenizer.json``, as transformers' classes follow it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_common.notes import note

from .settings import TokenizerSettings

GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def with_prefix_space(
    content: dict[str, Any], settings: TokenizerSettings, path: Path
) -> dict[str, Any]:
    """Return a ``tokenizer.json``'s content with the space before text that its class puts.

    GPT-2's class puts one if ``add_prefix_space`` is true, whatever the file says; Llama's follows
    the key where it stands. With other classes the file decides, as in transformers 5.
    """
    wanted, kind = settings.add_prefix_space, settings.tokenizer_class
    before = content.get("pre_tokenizer")
    if kind in GPT2:
        return {**content, "pre_tokenizer": _with_byte_level(before, wanted is True)}
    if kind in LLAMA and wanted is not None and _is_spaced(content):
        scheme = "never" if not wanted else "first" if settings.legacy is False else "always"
        return _with_scheme(content, scheme)
    given = [part.get("add_prefix_space") for part in parts(before)]
    said = {value for value in given if isinstance(value, bool)}  # the library refuses others
    is_read = wanted is not None or kind == "PreTrainedTokenizerFast"
    if is_read and said - {bool(wanted)}:
        note(
            f"{path}: puts {'a' if True in said else 'no'} space before text, which is followed as "
            f"in transformers 5, whatever add_prefix_space={wanted} says (version 4 may differ)"
        )
    return content


def parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a pre-tokenizer, normalizer or decoder and those within it."""
    if isinstance(part, dict):
        yield part
        for key in ("pretokenizers", "normalizers", "decoders"):
            inner = part.get(key)
            for each in inner if isinstance(inner, list) else ():
                yield from parts(each)


def _with_byte_level(part: Any, wanted: bool) -> Any:
    """Return a pre-tokenizer with ``add_prefix_space`` in its ByteLevel."""
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("pretokenizers"), list):
        return {
            **part,
            "pretokenizers": [_with_byte_level(p, wanted) for p in part["pretokenizers"]],
        }
    return {**part, "add_prefix_space": wanted} if part.get("type") == "ByteLevel" else part


def _is_spaced(content: dict[str, Any]) -> bool:
    """Return whether spaces become SentencePiece's mark, by the normalizer or Metaspace alone."""
    before = content.get("pre_tokenizer")
    if before is None:
        return any(part.get("type") == "Prepend" for part in parts(content.get("normalizer")))
    return isinstance(before, dict) and before.get("type") == "Metaspace"


def _with_scheme(content: dict[str, Any], scheme: str) -> dict[str, Any]:
    """Return a tokenizer's content in which Metaspace alone puts the space, by ``scheme``."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    rest = [
        part
        for part in parts(content.get("normalizer"))
        if part.get("type") not in ("Sequence", "Prepend")
        and (part.get("type"), part.get("content")) != ("Replace", "▁")
    ]
    normalizer = {"type": "Sequence", "normalizers": rest} if rest else None
    decoder = content.get("decoder")
    inner = decoder.get("decoders") if isinstance(decoder, dict) else None
    if scheme == "never" and isinstance(decoder, dict) and isinstance(inner, list):
        kept = [p for p in inner if not (isinstance(p, dict) and p.get("type") == "Strip")]
        decoder = {**decoder, "decoders": kept}
    return {**content, "normalizer": normalizer, "pre_tokenizer": space, "decoder": decoder}
