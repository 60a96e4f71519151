"""Labels of conversations, and windows of several packed conversations.

Axes: S tokens of a conversation, T positions of a window.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..data.packing import EMPTY, pack
from ..model.loss import IGNORE_INDEX
from ..tokenizer.answers import Segment
from .batch import Batch, by_document

Ids = NDArray[np.int64]


def labels(segments: Sequence[Segment]) -> tuple[Ids, Ids]:
    """Return a conversation's tokens int64 [S] and targets int64 [S].

    The target of a position is the next token where that is learnt, else IGNORE_INDEX. It depends
    on the token's place alone: an end token is learnt although it may also be what pads a batch.
    """
    tokens = np.array([i for segment in segments for i in segment.ids], dtype=np.int64)
    is_learnt = np.repeat([s.learnt for s in segments], [len(s.ids) for s in segments])
    targets = np.full_like(tokens, IGNORE_INDEX)
    targets[:-1] = np.where(is_learnt[1:], tokens[1:], IGNORE_INDEX)
    return tokens, targets


def cut_to(segments: Sequence[Segment], context: int) -> list[Segment]:
    """Return the segments up to the last answer that ``context`` positions can predict whole.

    Predicting S tokens takes S - 1 positions. Returns [] where not even the first answer fits.
    """
    ends = accumulate(len(segment.ids) for segment in segments)
    fitting = [i for i, end in enumerate(ends) if segments[i].learnt and end - 1 <= context]
    return list(segments[: fitting[-1] + 1]) if fitting else []


@dataclass(frozen=True)
class Examples:
    """Labelled conversations, one behind the other: N positions in all."""

    tokens: NDArray[np.int32]  # [N]
    targets: NDArray[np.int32]  # [N]
    starts: NDArray[np.int64]  # [conversations + 1]

    @classmethod
    def of(cls, conversations: Iterable[Sequence[Segment]]) -> "Examples":
        """Label conversations that end with an answer; their last tokens are targets alone."""
        tokens, targets, starts = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [0]
        for segments in conversations:
            own = labels(segments)
            tokens.append(own[0][:-1].astype(np.int32))
            targets.append(own[1][:-1].astype(np.int32))
            starts.append(starts[-1] + len(tokens[-1]))
        return cls(np.concatenate(tokens), np.concatenate(targets), np.array(starts, np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        """The number of positions of each conversation."""
        lengths: list[int] = np.diff(self.starts).tolist()
        return lengths

    @property
    def n_learnt(self) -> int:
        """The number of learnt tokens."""
        return int(np.count_nonzero(self.targets != IGNORE_INDEX))


class PackedWindows(Dataset[Tensor]):
    """Windows of several conversations, int64 [3, T]: tokens, targets, and conversation numbers.

    What no conversation fills is token 0 without a target, a document of its own.
    """

    def __init__(self, examples: Examples, context: int) -> None:
        self.examples, self.context = examples, context
        self.members = pack(examples.lengths, context)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> Tensor:
        members = [] if number == EMPTY else self.members[number]
        window = np.zeros((3, self.context), dtype=np.int64)
        window[1], window[2] = IGNORE_INDEX, len(members)
        at, (tokens, targets, starts) = 0, self._arrays
        for document, i in enumerate(members):
            begin, end = starts[i], starts[i + 1]
            here = slice(at, at + end - begin)
            window[0, here], window[1, here] = tokens[begin:end], targets[begin:end]
            window[2, here] = document
            at = here.stop
        return torch.from_numpy(window)

    @property
    def _arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        return self.examples.tokens, self.examples.targets, self.examples.starts

    @property
    def fill(self) -> float:
        """The share of the windows' positions that hold conversations."""
        return len(self.examples.tokens) / (len(self) * self.context)

    def batches(self, rows: int, most: int) -> Iterator[Tensor]:
        """Yield windows [rows, 3, T] in order, at most ``most`` times (0 = all), spread evenly."""
        n = min(len(self), most * rows) if most else len(self)
        numbers = np.linspace(0, len(self) - 1, n).astype(int).tolist()
        for i in range(0, n, rows):
            yield torch.stack([self[number] for number in numbers[i : i + rows]])


def packed_batch(windows: Tensor) -> Batch:
    """Return packed windows [B, 3, T] as a micro-batch, in which conversations are on their own."""
    tokens_BT, targets_BT, document_BT = windows.unbind(1)
    return by_document(tokens_BT, targets_BT, document_BT)
