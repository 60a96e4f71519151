"""Make the training step of a reward model from pairs of answers, as the oracle lays them out.

The pairs are read and written by their chat template as llama_torch.reward does it; margins, labels
and padding are the oracle's own.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llama_common.errors import InputError
from reference_np import reward
from reference_np.config import LlamaConfig
from reference_np.ops import IGNORE, Array
from reference_np.reward_model import PairBatch

from .conversations import EXACT
from .judging import Reference, Row, judge
from .report_rows import counted
from .sizes import require_attention_memory

if TYPE_CHECKING:
    from llama_torch.data.preferences import Pair

LENGTH = 128  # tokens of a conversation, unless --tokens says otherwise
N_PAIRS = 6  # in two micro-batches, so that these must add up
STRENGTHS = [*reward.MARGINS["small"]]  # the oracle's names, in the order of the reader's
Ids = tuple[list[int], list[int]]  # of a chosen and a rejected conversation


class RewardInput(NamedTuple):
    """The pairs of a training step, and the micro-batches of the oracle."""

    pairs: "list[list[Pair]]"  # of each micro-batch
    ids: list[list[Ids]]  # of each micro-batch
    batches: list[PairBatch]
    margin: str  # the scale, or "none"
    safety_weight: float
    template: Any  # llama_torch's ChatTemplate
    note: str

    @property
    def n_pairs(self) -> int:
        """The number of pairs of all micro-batches."""
        return sum(map(len, self.pairs))


def read_reward_input(
    path: str,
    ckpt: Path,
    template: str,
    margin: str,
    safety_weight: float,
    length: int,
    config: LlamaConfig,
) -> RewardInput:
    """Read a file's first pairs; return the training step on them, the longest pairs first.

    length  tokens of a conversation at most.

    Raises InputError for what is no pair, for a file without a pair that fits, for a safety loss
    without a labelled answer, and without PyTorch.
    """
    written, found = _first_pairs(path, ckpt, template, length, config)
    found.sort(key=lambda one: -max(map(len, one[1])))
    cut = -(-2 * len(found) // 3)
    parts = [part for part in (found[:cut], found[cut:]) if part]
    pairs = [[pair for pair, _ in part] for part in parts]
    ids = [[both for _, both in part] for part in parts]
    batches = [lay_out(*part, margin) for part in zip(pairs, ids, strict=True)]
    for batch in batches:
        shape = batch.tokens.shape
        require_attention_memory(f"--reward {path}", shape, shape[1], config)
    n_labelled = int(sum(np.sum(batch.labels != IGNORE) for batch in batches))
    if safety_weight and not n_labelled:
        raise InputError(
            f"--safety-loss: none of the {counted(len(found), 'pair')} read of {path} says whether "
            "its answers are safe; give chosen_safe and rejected_safe, or leave it out"
        )
    note = f"{_described(path, [pair for pair, _ in found], margin)}"
    note += f", {counted(n_labelled, 'answer')} labelled safe or unsafe." if safety_weight else "."
    return RewardInput(pairs, ids, batches, margin, safety_weight, written, note)


def _first_pairs(
    path: str, ckpt: Path, template: str, length: int, config: LlamaConfig
) -> "tuple[Any, list[tuple[Pair, Ids]]]":
    """Return the chat template, and the file's first pairs that fit with their token ids."""
    try:
        from llama_torch.data.preferences import read_pairs
        from llama_torch.tokenizer.chat_template import load_jinja
        from llama_torch.tokenizer.loading import load_tokenizer
        from llama_torch.training.conversation_loading import DAY
        from llama_torch.training.pair_loading import encode_pair
    except ImportError:
        raise InputError(
            "--reward reads pairs as llama_torch does: pip install 'llama-parity[torch]'"
        ) from None
    written = load_jinja(ckpt, load_tokenizer(ckpt, config.vocab_size), template, DAY)
    found: list[tuple[Pair, Ids]] = []
    for pair in read_pairs([path], "--reward"):
        both = encode_pair(written, pair)
        if max(map(len, both)) <= length:
            found.append((pair, both))
        if len(found) == N_PAIRS:
            break
    if not found:
        raise InputError(
            f"--reward {path}: no pair has two conversations of {length} tokens or less; use "
            "--tokens, or give a file with pairs"
        )
    return written, found


def lay_out(pairs: "Sequence[Pair]", ids: Sequence[Ids], margin: str) -> PairBatch:
    """Return a micro-batch, padded on the right to its longest conversation."""
    rows = [*chain.from_iterable(ids)]
    width = max(map(len, rows))
    tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows])
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    safe = [one for pair in pairs for one in pair.is_safe]
    labels = np.array([IGNORE if one is None else int(one) for one in safe])
    return PairBatch(tokens, mask, np.array([_margin(pair, margin) for pair in pairs]), labels)


def _margin(pair: "Pair", scale: str) -> float:
    """Return a pair's margin, 0 where its strength is not given."""
    has_none = scale == "none" or pair.strength >= len(STRENGTHS)
    return 0.0 if has_none else reward.margin(STRENGTHS[pair.strength], scale)


def _described(path: str, pairs: "Sequence[Pair]", margin: str) -> str:
    names = [*STRENGTHS, "of no given strength"]
    found = [sum(pair.strength == i for pair in pairs) for i in range(len(names))]
    strengths = [f"{n} {name}" for n, name in zip(found, names, strict=True) if n]
    return f"{counted(len(pairs), 'pair')} of {path} ({', '.join(strengths)}), margin {margin}"


def layout_rows(given: RewardInput, batches: Sequence[Any], margins: Sequence[Any]) -> list[Row]:
    """Return rows of llama_torch's micro-batches beside the oracle's, exactly.

    batches  of llama_torch.training.batch.Batch, whose targets are the values of Column.
    margins  of each micro-batch, [P].
    """
    from llama_torch.training.pair_objective import Column

    ends = [np.asarray(batch.targets[:, Column.LAST]) + 1 for batch in batches]
    of_torch: list[Any] = [
        [
            row[:end]
            for batch, last in zip(batches, ends, strict=True)
            for row, end in zip(np.asarray(batch.tokens), last, strict=True)
        ],
        ends,
        [np.asarray(margin) for margin in margins],
        [_labels(np.asarray(batch.targets[:, Column.SAFE])) for batch in batches],
    ]
    rows = [row for part in given.ids for both in part for row in both]
    of_oracle: list[Any] = [
        rows,
        [[len(row) for row in rows]],
        [batch.margins for batch in given.batches],
        [batch.labels for batch in given.batches],
    ]
    names = "reward tokens", "reward lengths", "reward margins", "reward labels"
    return [
        judge((0, name), _flat(theirs), [Reference(_flat(exact), EXACT)])
        for name, theirs, exact in zip(names, of_torch, of_oracle, strict=True)
    ]


def _labels(safe: Array) -> Array:
    return np.where(safe < 0, IGNORE, safe)


def _flat(parts: Sequence[Any]) -> Array:
    """Return numbers as float64 [1, n, 1]."""
    joined = np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in parts])
    return joined.reshape(1, -1, 1)
