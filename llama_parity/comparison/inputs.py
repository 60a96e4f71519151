"""Make the calls of a comparison from a text, from token ids, or from a text of Python's own.

Axes: B batch, T tokens of the call, S cached + T.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_common.errors import InputError
from llama_common.help_topics import help_topics
from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.ops import Array

from .sizes import require_attention_memory, require_steps_memory
from .trace_format import Call

GPT2_VOCAB_SIZE = 50257
NO_ENCODING = "llama_torch's is not installed: pip install 'llama-parity[torch]'; or give --ids"
CHUNK = 2  # tokens of the second call, the one on a cache with more than one token
PADDED, FAR = 16, 8  # largest lengths of the left-padded run and of that at the context's end


def token_ids(
    config: LlamaConfig, *, prompt: str, file: str, ids: Sequence[int], limit: int
) -> Array:
    """Return the ids of ``ids``, ``prompt``, ``file`` or a text of Python's own, int64 [<= limit].

    Raises InputError for more than one of them, an id outside the vocabulary, a vocabulary that
    the text's tokenizer does not fit, and a file without text.
    """
    if sum(map(bool, (prompt, file, ids))) > 1:
        raise InputError("--prompt, --file and --ids exclude each other; give one of them")
    if ids:
        wrong = [i for i in ids if not 0 <= i < config.vocab_size]
        if wrong:
            raise InputError(f"--ids: {wrong[0]} is outside the vocabulary of {config.vocab_size}")
        return np.array(ids[:limit], dtype=np.int64)
    text = prompt or (_read(file) if file else next(help_topics()))
    text_ids = _gpt2_ids(text, config, "--file " + file if file else "--prompt", limit)
    if text_ids is None and (prompt or file):
        small = f"vocab_size {config.vocab_size} is too small for it; give --ids, or neither"
        why = NO_ENCODING if config.vocab_size >= GPT2_VOCAB_SIZE else small
        flag = "--prompt" if prompt else "--file"
        raise InputError(f"{flag} needs the GPT-2 encoding, and {why}")
    if text_ids is None:  # the text's bytes, modulo the vocabulary's size
        text_ids = [byte % config.vocab_size for byte in text.encode()[:limit]]
    if not text_ids:
        raise InputError(f"--file {file}: holds no text; give another")
    return np.array(text_ids, dtype=np.int64)


def _gpt2_ids(text: str, config: LlamaConfig, place: str, limit: int) -> list[int] | None:
    """Return a text's GPT-2 ids, at most ``limit``; None for a vocabulary too small, or no torch.

    Raises InputError, which quotes ``place``, for a text that cannot be encoded.
    """
    if config.vocab_size < GPT2_VOCAB_SIZE or importlib.util.find_spec("torch") is None:
        return None
    from llama_torch.tokenizer.gpt2 import gpt2_ids, located

    with located(place):
        return list(gpt2_ids(text[: 32 * limit])[:limit])


def make_calls(
    ids: Array,
    config: LlamaConfig,
    lengths: Sequence[int],
    steps: int,
    limits: Limits = UNLIMITED,
) -> list[Call]:
    """Return the calls of a run for each length, of a left-padded run and of the context's end.

    A run of a length has the default positions and mask: a prompt [2, T], ``CHUNK`` tokens on its
    cache, then ``steps`` single tokens. Its two rows are the ids and the ids shifted, since an
    exchange of equal rows would not show. The left-padded run has positions and a mask of its own
    and decodes one token. The last call is at the end of the context, where rounded rotary angles
    show. Inside ``limits`` runs have one row, padding on the right or no positions, and continue
    by single tokens. Raises InputError for runs that no memory holds.
    """
    calls: list[Call] = []
    chunk = CHUNK if limits.appended == "any" else 1
    if CHUNK + steps >= config.max_seq_len:  # no room for decoding
        steps = 0
    require_steps_memory(steps, len(lengths))
    extra = [chunk] * (steps > 0) + [1] * steps
    for length in lengths:
        length = min(length, config.max_seq_len - sum(extra))
        place = f"a prompt of {length:,} tokens (--tokens)"
        require_attention_memory(place, (2, length), length, config)
        rows = _two_rows(ids, length + sum(extra), len(ids) // 3, config)[: limits.batch]
        title = f"{length} tokens"
        calls.append(Call(title, rows[:, :length]))
        start = length
        for n, width in enumerate(extra):
            name = f"{title}, then {width}" if n == 0 else f"{title}, step {n}"
            calls.append(Call(name, rows[:, start : start + width], after=len(calls) - 1))
            start += width
    return [*calls, *_padded(ids, config, len(calls), limits), _far(ids, config)]


def _padded(ids: Array, config: LlamaConfig, index: int, limits: Limits) -> list[Call]:
    """Return a prompt [2, T] whose second row is padded, and a token after each row.

    Padding is on the left unless the limits allow the right alone. Left out, positions follow the
    columns: for a padded row, all are shifted alike, which rotations do not see.
    """
    length = min(PADDED, len(ids) + 1, config.max_seq_len - 1)
    if length < 2:
        return []
    pad = length // 2
    tokens = _two_rows(ids, length + 1, 1, config)
    real = np.ones((2, length + 1), dtype=bool)
    on_left = limits.padding_sides != (False,)
    real[1, slice(pad) if on_left else slice(length - pad, length)] = False
    tokens[~real] = 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    allowed = np.tril(np.ones((length + 1, length + 1), dtype=bool)) & real[:, None]
    allowed |= np.eye(
        length + 1, dtype=bool
    )  # padding attends to itself: no row of the mask is empty
    given = limits.positions == "any"
    prompt = Call(
        "padded",
        tokens[:, :-1],
        positions[:, :-1] if given else None,
        np.ascontiguousarray(allowed[:, :-1, :-1]),
    )
    step = Call(
        "padded, step 1",
        tokens[:, -1:],
        positions[:, -1:] if given or not on_left else None,
        np.ascontiguousarray(allowed[:, -1:]),
        after=index,
    )
    return [prompt, step]


def _far(ids: Array, config: LlamaConfig) -> Call:
    """Return a call of one row [1, T] at the last positions of the context."""
    length = min(FAR, config.max_seq_len)
    positions = np.arange(config.max_seq_len - length, config.max_seq_len)[None]
    return Call(f"position {positions[0, 0]:,} on", _cycle(ids, length, 0)[None], positions)


def _two_rows(ids: Array, length: int, shift: int, config: LlamaConfig) -> Array:
    """Return the ids and the ids shifted [2, length], repeated, and made to differ everywhere."""
    first, second = _cycle(ids, length, 0), _cycle(ids, length, shift)
    return np.stack([first, np.where(first == second, (second + 1) % config.vocab_size, second)])


def _cycle(ids: Array, length: int, shift: int) -> Array:
    return np.resize(np.roll(ids, -shift), length)


def _read(path: str) -> str:
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError("no regular file")  # a pipe is not waited for, nor a device read
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {path}: cannot be read ({error})") from None
