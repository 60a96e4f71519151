"""The GPT-2 encoding, built from merge ranks in this package, and its Hugging Face files."""

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llama_common.errors import InputError

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257
LONG = 100_000  # maximum run of blanks, followed by other text, that is passed to tiktoken
BLANK = r"[^\S\x1c-\x1f]"  # Unicode's white space; Python's \s has four control characters more


class EncodingError(InputError):
    """A text that a tokenizer library cannot encode; ``located`` adds the text's place."""


@contextmanager
def guarded(library: str, text: str | None = None) -> Iterator[None]:
    """Raise EncodingError where ``library``, written in Rust, panics, on ``text`` if that is given.

    A panic's class has no public name and is no subclass of Exception, so it is told by its name.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        if text is None:
            raise EncodingError(f"the {library} library fails: {reason}") from None
        runs = ((match.end() - match.start(), match.start()) for match in re.finditer(r"\s+", text))
        n, start = max(runs, default=(0, 0))
        raise EncodingError(
            f"the {library} library cannot encode this text ({reason}); its longest run of blanks "
            f"has {n} characters, from its character {start} on: shorten that"
        ) from None


@contextmanager
def located(place: str | Callable[[], str]) -> Iterator[None]:
    """Raise InputError for an EncodingError, its message preceded by ``place`` or its result."""
    try:
        yield
    except EncodingError as error:
        place = place if isinstance(place, str) else place()
        raise InputError(f"{place}: {error}") from None


def _ranks() -> dict[bytes, int]:
    """Return the merge ranks; InputError for a damaged file, which would shift later ids."""
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
    """Return tiktoken's GPT-2 encoding, without a download."""
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=_ranks(),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )


def gpt2_ids(text: str) -> list[int]:
    """Return the GPT-2 token ids of ordinary text, with runs of blanks of any length.

    Raises EncodingError where tiktoken panics.
    """
    with guarded("tiktoken", text):
        parts = [gpt2().encode_ordinary(part) for part in _cut_long_runs(text)]
    return parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))


def _cut_long_runs(text: str) -> list[str]:
    """Return text cut before the last blank of every long run that other text follows.

    GPT-2's pattern always begins a match there, as it leaves the last blank of a run to the next
    match, and has no lookbehind. So the ids of the parts are those of the whole text.
    """
    # A quick check first: a run longer than LONG fills one of these slices.
    half = max(1, LONG // 2)
    if not any(text[i : i + half].isspace() for i in range(0, len(text), half)):
        return [text]
    runs = (match.span() for match in re.finditer(f"{BLANK}{{2,}}", text))
    cuts = [end - 1 for start, end in runs if end - start > LONG and end < len(text)]
    return [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]


@lru_cache(maxsize=1)
def hf_files() -> dict[str, str]:
    """Return the files, text by name, from which transformers.AutoTokenizer builds the same."""
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
    vocab, merges = vocab_and_merges(_ranks())
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


def vocab_and_merges(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[list[str]]]:
    """Return the tokens' ids, and the pairs that they are merged from, in printable characters.

    Pairs are in the order of their tokens' ranks, in which the tokenizers library applies them. A
    token that no merges of its bytes lead to has no pair.
    """
    spell = byte_spelling()
    vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    pairs = (_last_merge(t, ranks) for t in sorted(ranks, key=ranks.__getitem__) if len(t) > 1)
    merges = [["".join(spell[b] for b in part) for part in pair] for pair in pairs if pair]
    return vocab, merges


def byte_spelling() -> list[str]:
    """Return GPT-2's printable character for each byte (Radford et al. 2019, section 2.2).

    Printable Latin-1 bytes are spelled as themselves; the others as 256, 257, ... in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def spelled_bytes() -> dict[str, int]:
    """Return the byte of each of GPT-2's printable characters: ``byte_spelling`` the other way."""
    return {character: byte for byte, character in enumerate(byte_spelling())}


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the two parts that merge into ``token``, after all merges of lower rank.

    Returns [] where those merges do not leave two parts.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        i = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        if pair_ranks[i] == math.inf:
            return []
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
