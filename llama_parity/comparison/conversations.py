"""Make a comparison's calls and training step from conversations: what fine-tuning computes.

The oracle says which tokens are learnt, how conversations are packed, and where each attends to.
The conversations are read and written by their chat template as llama_torch.sft does it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_common.errors import InputError
from reference_np import sft
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.limits import Limits
from reference_np.ops import IGNORE, Array
from reference_np.tolerances import Errors

from .judging import Reference, Row, judge
from .sizes import require_attention_memory
from .trace_format import Call

LENGTH = 128  # tokens of a row, unless --tokens says otherwise
N_ROWS = 2  # each a micro-batch of the training step
Segments = Sequence[tuple[Sequence[int], bool]]  # token ids, learnt


EXACT = Errors(0.0, 0.0, 0.0)  # the bound of labels


class FineTuning(NamedTuple):
    """The calls and the training step of some conversations."""

    segments: list[Segments]  # of each conversation
    calls: list[Call]
    batches: list[Batch]  # one for each call
    note: str


def read_conversations(
    path: str, ckpt: Path, template: str, length: int, config: LlamaConfig, limits: Limits
) -> FineTuning:
    """Read a file's first conversations; return what is compared on them.

    length  tokens of a row at most.

    Where ``limits`` leave no positions or masks of its own to a row, it has one conversation.
    Raises InputError for a file without a conversation that fits, and without PyTorch.
    """
    packs = limits.positions == "any" and limits.masks in ("any", "no later keys")
    found: list[list[tuple[Segments, int]]] = []
    for segments in _segments(path, ckpt, template, config):
        size = sum(len(ids) for ids, _ in segments)
        if size > length:
            continue
        if found and packs and sum(n for _, n in found[-1]) + size <= length:
            found[-1].append((segments, size))
        elif len(found) < N_ROWS:
            found.append([(segments, size)])
        else:
            break
    if not found:
        raise InputError(f"--sft {path}: no conversation has {length} tokens or less; use --tokens")
    members = [[segments for segments, _ in row] for row in found]
    batches = [sft.pack([sft.sft_labels(segments) for segments in row]) for row in members]
    if not packs:
        batches = [batch._replace(positions=None, mask=None) for batch in batches]
    calls = []
    for n, batch in enumerate(batches, 1):
        tokens = batch.tokens
        require_attention_memory(f"--sft {path}", tokens.shape, tokens.shape[1], config)
        calls.append(Call(f"conversations {n}", tokens, batch.positions, batch.mask))
    learnt = sum(int(np.sum(batch.targets != IGNORE)) for batch in batches)
    note = f"{sum(map(len, members))} conversations of {path}, {learnt} tokens of them learnt."
    return FineTuning([one for row in members for one in row], calls, batches, note)


def _segments(path: str, ckpt: Path, template: str, config: LlamaConfig) -> Iterator[Segments]:
    try:
        from llama_torch.data import conversations
        from llama_torch.tokenizer.answers import answer_segments
        from llama_torch.tokenizer.chat_template import load_jinja
        from llama_torch.tokenizer.loading import load_tokenizer
        from llama_torch.training.conversation_loading import DAY
    except ImportError:
        raise InputError(
            "--sft reads conversations as llama_torch does: pip install 'llama-parity[torch]'"
        ) from None
    written = load_jinja(ckpt, load_tokenizer(ckpt, config.vocab_size), template, DAY)
    for one in conversations.read_conversations([path], "--sft"):
        try:
            yield answer_segments(written, one.messages, one.learnt)
        except InputError as error:
            raise InputError(f"{one.place}: {error}") from None


def label_rows(conversations: Sequence[Segments], first_call: int = 0) -> list[Row]:
    """Return rows of llama_torch's labels, packed in one window, beside the oracle's, exactly.

    The last token of a conversation is a target alone there.
    """
    from llama_torch.tokenizer.answers import Segment
    from llama_torch.training.labels import Examples, PackedWindows, packed_batch

    segments = [[Segment(list(ids), learnt) for ids, learnt in one] for one in conversations]
    examples = Examples.of(segments)
    windows = PackedWindows(examples, sum(examples.lengths))
    (members,) = windows.members
    theirs = packed_batch(windows[0][None])
    theirs = theirs._replace(mask=theirs.dense_mask)
    labels = [sft.sft_labels(conversations[i]) for i in members]
    exact = sft.pack([(tokens[:-1], targets[:-1]) for tokens, targets in labels])
    rows = []
    for name in Batch._fields:
        of_torch, of_oracle = (_as_activation(getattr(b, name)) for b in (theirs, exact))
        rows.append(judge((first_call, f"sft {name}"), of_torch, [Reference(of_oracle, EXACT)]))
    return rows


def _as_activation(values: Any) -> Array:
    """Return integers or booleans [1, T, ...] as float64 [1, T, ...] with an axis of features."""
    array = np.asarray(values, np.float64)
    return array if array.ndim > 2 else array[..., None]
