"""The tokenizer of a Hugging Face directory as a GGUF file's metadata, tokenizer.ggml.*.

llama.cpp cuts a text as the name in tokenizer.ggml.pre says, and has no place for normalizers and
for the flags of added tokens: what it would do otherwise is noted, or leaves the tokenizer out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_common.notes import note
from llama_torch.tokenizer import pieces
from llama_torch.tokenizer.gpt2 import VOCAB_SIZE, hf_files
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.settings import read_settings
from llama_torch.tokenizer.tokenizer import Gpt2, Tokenizer

from .llama3_tokenizer import PATTERN
from .token_ids import BOS, EOS, PAD, TokenIds

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
ABSENT_SCORE = -1000.0  # of tokens that no merge makes
BPE = 2  # of SentencePiece's kinds of models
EOM = "<|eom_id|>"
TOKENS = "tokenizer.ggml.tokens"
NONE = {"tokenizer.ggml.model": "none"}

DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# llama.cpp's name -> the pre-tokenizers, in order, and whether a piece that is a token is that.
PRE: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "llama-bpe": ([SPLIT, BYTE_LEVEL | {"use_regex": False}], True),
    "gpt-2": ([BYTE_LEVEL], False),
    "smollm": ([DIGITS, BYTE_LEVEL], False),
}


def vocabulary_of(
    folder: Path, vocab_size: int, ids: TokenIds, flagged: TokenIds
) -> dict[str, Any]:
    """Return the metadata of a directory's tokenizer; of none, that there is none.

    BOS and EOS are the tokenizer's own; ``ids`` has those of other files and ``flagged``, which
    come before all, those of flags. Raises InputError for a tokenizer that cannot be read or does
    not fit the vocabulary.
    """
    slow, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    has_pieces = slow.is_file() and not pieces.is_ranks(slow)
    is_gpt2 = not slow.is_file() and VOCAB_SIZE <= vocab_size < 2 * VOCAB_SIZE
    if not has_pieces and not fast.is_file() and not is_gpt2:
        return NONE | _ids(ids | flagged, ())
    tokenizer = load_tokenizer(folder, vocab_size)
    if has_pieces:
        found = _of_pieces(slow, vocab_size)
    else:
        content = read_json(fast) if fast.is_file() else json.loads(hf_files()[fast.name])
        found = _of_json(fast, content, tokenizer, vocab_size)
    own = _own_first(tokenizer, ids) | flagged
    if not found:
        return NONE | _ids(own, ())
    return found | _ids(own, found[TOKENS]) | _template(folder)


def _own_first(tokenizer: Tokenizer, ids: TokenIds) -> TokenIds:
    """Return ids in which BOS is the tokenizer's, and EOS the first of the end tokens."""
    found = dict(ids)
    if tokenizer.bos in tokenizer.special:
        found[BOS] = tokenizer.special[tokenizer.bos]
    if tokenizer.eos in tokenizer.special:
        own, ends = tokenizer.special[tokenizer.eos], _listed(ids.get(EOS))
        found[EOS] = [own, *(end for end in ends if end != own)]
    return found


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _ids(ids: TokenIds, tokens: Sequence[str]) -> dict[str, int]:
    """Return the ids of the special tokens; of several end tokens GGUF has places for three.

    Without tokens llama.cpp reads none of them, but the way back to Hugging Face's form does.
    """
    found: dict[str, int] = {}
    for key, name in ((BOS, "bos"), (PAD, "padding")):
        if ids.get(key) is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = ids[key]
    for end in _listed(ids.get(EOS)):
        names = ("eom", "eot", "eos") if tokens and tokens[end] == EOM else ("eos", "eot", "eom")
        free = [k for n in names if (k := f"tokenizer.ggml.{n}_token_id") not in found]
        if free:
            found[free[0]] = end
        else:
            note(f"the end token {end} is left out: a GGUF file has places for three")
    return found


def _template(folder: Path) -> dict[str, str]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"tokenizer.chat_template": path.read_text(encoding="utf-8")}
    beside = folder / "tokenizer_config.json"
    template = read_json(beside).get("chat_template") if beside.is_file() else None
    if template is not None and not isinstance(template, str):
        note(f"{beside}: several chat templates; none is carried over")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _filled(tokens: dict[int, tuple[str, int]], vocab_size: int) -> dict[str, list[Any]]:
    """Return the lists of tokens and kinds; ids without a token get llama.cpp's name."""
    rows = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    return {
        TOKENS: [text for text, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, kind in rows],
    }


def _of_pieces(path: Path, vocab_size: int) -> dict[str, Any]:
    settings = read_settings(path.parent)
    tokenizer = pieces.SentencePiece(path, settings)
    if tokenizer.n_ids > vocab_size:
        raise InputError(f"{path}: has more tokens than the model's {vocab_size}; copy its own")
    proto = path.read_bytes()
    if pieces.read_fields(proto, 2).get(3, (0, b""))[0] != BPE:
        note(f"{path}: is no BPE model, as llama.cpp takes it for; no tokenizer is written")
        return {}
    normalizer = pieces.read_fields(proto, 3)
    if normalizer.get(2, (0, b""))[1] or normalizer.get(4, (1, b""))[0]:
        note(f"{path}: its normalizer is not carried over: llama.cpp takes texts as they are")
    if not tokenizer.is_legacy and tokenizer.starts_with_space:
        note(f"{path}: legacy=false is not carried over: a space stands after special tokens")
    _note_flags(tokenizer, path)
    spans = [proto[start:end] for start, end in pieces.piece_spans(proto)]
    found: dict[int, tuple[str, int]] = dict(enumerate(map(pieces.read_piece, spans)))
    scores = [pieces.read_score(message) for message in spans]
    for name, i in tokenizer.special.items():
        if i >= len(spans) or found[i][0] != name:
            found[i] = (name, CONTROL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **_filled(found, vocab_size),
        "tokenizer.ggml.scores": scores + [ABSENT_SCORE] * (vocab_size - len(scores)),
        "tokenizer.ggml.add_space_prefix": tokenizer.starts_with_space,
        **_prefix(tokenizer, path),
        **_unknown(found),
    }


def _unknown(found: Mapping[int, tuple[Any, ...]]) -> dict[str, int]:
    unknown = [i for i, (_, kind) in found.items() if kind == pieces.UNKNOWN]
    return {"tokenizer.ggml.unknown_token_id": unknown[0]} if unknown else {}


def _prefix(tokenizer: Tokenizer, path: Path) -> dict[str, bool]:
    """Return whether BOS stands before a text; no token stands after it."""
    bos = tokenizer.special.get(tokenizer.bos or "", -1)
    if tokenizer.prefix not in ((), (bos,)):
        note(f"{path}: puts {len(tokenizer.prefix)} tokens before a text; GGUF has a BOS alone")
    added = bool(tokenizer.prefix)
    return {"tokenizer.ggml.add_bos_token": added, "tokenizer.ggml.add_eos_token": False}


def _note_flags(tokenizer: Tokenizer, path: Path) -> None:
    if tokenizer.lstrip or tokenizer.rstrip or tokenizer.single_words:
        note(f"{path}: lstrip, rstrip and single_word of its tokens are not carried over")


def _of_json(
    path: Path, content: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> dict[str, Any]:
    """Return a byte-level tokenizer.json's metadata, {} of one that llama.cpp does not have."""
    pre = _pre_tokenizer(content)
    if pre is None:
        note(
            f"{path}: is no byte-level tokenizer of {', '.join(PRE)}, and no tokenizer.model is "
            "beside it; no tokenizer is written"
        )
        return {}
    if not isinstance(tokenizer, Gpt2):
        _note_flags(tokenizer, path)
    model = content["model"]
    found = {id_: (text, NORMAL) for text, id_ in model["vocab"].items()}
    for token in content.get("added_tokens") or ():
        kind = CONTROL if token.get("special") else USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    for name, id_ in tokenizer.special.items():
        found.setdefault(id_, (name, CONTROL))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        **_filled(found, vocab_size),
        **({"tokenizer.ggml.merges": merges} if merges else {}),
        **_prefix(tokenizer, path),
    }


def _pre_tokenizer(content: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of a tokenizer.json's way to cut a text, None if it has none."""
    model, outer = content["model"], content.get("pre_tokenizer") or {}
    steps = [dict(step) for step in outer.get("pretokenizers", [outer])]
    for step in steps:
        step.pop("trim_offsets", None)  # no id depends on it
        if step.get("type") == "ByteLevel":
            step.setdefault("use_regex", True)
    plain = not content.get("normalizer") and not model.get("byte_fallback")
    for name, (wanted, whole) in PRE.items():
        if plain and steps == wanted and bool(model.get("ignore_merges")) == whole:
            return name
    return None
