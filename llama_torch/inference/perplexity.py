"""Perplexity of a model on documents, read in windows with a stride.

Suffixes: B window, T position, D dim, S scored token of the whole batch.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama_common.errors import InputError
from llama_common.memory import gib

from ..common.device import total_memory
from ..model.llama import Llama
from ..model.loss import IGNORE_INDEX, count_valid, loss_sum
from ..tokenizer.gpt2 import located
from ..tokenizer.tokenizer import Tokenizer

FIGURES = "perplexity", "bits_per_byte", "tokens_per_second"

POOL_BATCHES = 32  # batches whose windows are sorted by length together, to need little padding

Pair = tuple[Tensor, Tensor]  # tokens and targets, both [T] (a window) or [B, T] (a batch)


@dataclass
class Measurement:
    """Settings, counts and summed loss of one evaluation, and the figures computed from them."""

    context: int  # maximum number of tokens in a window
    stride: int  # scored tokens of each window after a document's first
    before: tuple[int, ...]  # ids before each document; empty: its first token is not scored
    documents: int = 0  # number of documents that are not empty
    bytes: int = 0  # UTF-8 bytes of the documents, those of unscored first tokens included
    tokens: int = 0  # number of scored tokens
    nats: float = 0.0  # sum of -log p(token) over them
    seconds: float = 0.0  # wall time of the forward passes

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss per token; comparable between models of one tokenizer."""
        return math.exp(min(self.nats / self.tokens, 700.0))  # exp overflows just above

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text; comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second of the forward passes' wall time."""
        return self.tokens / self.seconds


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    context: int = 0,
    stride: int = 0,
    batch_size: int = 8,
    place: Callable[[int], str] = "--data: document {}".format,
) -> Measurement:
    """Return the loss of a model, summed over documents, with counts and times.

    texts       the documents, each scored on its own.
    context     tokens in a window; 0: the model's context.
    stride      scored tokens of each window after the first; 0: half the window.
    batch_size  windows in one forward pass.
    place       returns, for a document's number (from 1), the place to name in an error.

    Raises InputError for a document that is not valid text or that the tokenizer cannot encode,
    a window longer than the model's context, a stride longer than the window, a batch that no
    memory holds, texts without a token to score, and a loss that is not finite.
    """
    longest = model.config.max_seq_len
    context = context or longest
    stride = stride or max(1, context // 2)
    if context > longest:
        raise InputError(f"--context {context} is more than the model's {longest}; use less")
    if stride > context:
        raise InputError(f"--stride {stride} is more than the window of {context}; use less")
    found = Measurement(context, stride, prefix_ids(tokenizer))
    for tokens_BT, targets_BT in _batches(_windows(found, tokenizer, texts, place), batch_size):
        require_batch_memory(model, *tokens_BT.shape)
        started = time.perf_counter()
        found.nats += nll(model, tokens_BT, targets_BT)
        found.seconds += time.perf_counter() - started
        found.tokens += count_valid(targets_BT)
        if not math.isfinite(found.nats):
            raise InputError(f"the loss is {found.nats}; check the model's weights with compare.py")
    if found.tokens == 0:
        raise InputError("--data: holds no token to score; give a longer text")
    return found


def require_batch_memory(model: Llama, rows: int, length: int) -> None:
    """Raise InputError where a forward pass on [rows, length] surely takes more than there is.

    What is there at one time: the keys and values of all layers, and a block's two hidden vectors
    of each token.
    """
    config, weight = model.config, model.model.embed_tokens.weight
    keys_and_values = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    needed = rows * length * weight.itemsize * (keys_and_values + 2 * config.hidden_dim)
    if needed > (there := total_memory(weight.device)):
        raise InputError(
            f"--batch-size: {rows} windows of {length:,} tokens take at least {gib(needed)} of "
            f"memory, and there are {gib(there)}; use fewer, or a smaller --context"
        )


def prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the unscored ids before each document: the prefix, else BOS, else EOS, else none."""
    name = tokenizer.bos or tokenizer.eos
    return tokenizer.prefix or (() if name is None else (tokenizer.special[name],))


def spans(length: int, first: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (start, scored, end) over ``length`` ids, scoring each from ``first`` on once.

    The model reads ids[start : end - 1], at most ``context`` of them, and its predictions of
    ids[scored:end] are scored: ``stride`` of them after the first window.
    """
    assert 0 < stride <= context
    scored = first
    while scored < length:
        end = min(context + 1 if scored <= context else scored + stride, length)
        yield max(0, end - 1 - context), scored, end
        scored = end


def _windows(
    found: Measurement, tokenizer: Tokenizer, texts: Iterable[str], place: Callable[[int], str]
) -> Iterator[Pair]:
    """Yield the windows (tokens and targets) of all documents; count those in ``found``."""
    for number, text in enumerate(texts, 1):
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError:  # half of a surrogate pair
            raise InputError(f"{place(number)} is not valid text; correct it") from None
        if not text:
            continue
        found.documents += 1
        found.bytes += n_bytes
        with located(partial(place, number)):
            encoded = tokenizer.encode(text)
        ids = torch.tensor([*found.before, *encoded], dtype=torch.long)
        first = max(1, len(found.before))
        for start, scored, end in spans(len(ids), first, found.context, found.stride):
            targets_T = ids[start + 1 : end].clone()
            targets_T[: scored - start - 1] = IGNORE_INDEX
            yield ids[start : end - 1], targets_T


def _batches(windows: Iterator[Pair], size: int) -> Iterator[Pair]:
    """Yield batches [B, T] of windows of similar lengths, padded on the right.

    Causal attention hides the padding; its targets are IGNORE_INDEX.
    """
    while pool := list(islice(windows, POOL_BATCHES * size)):
        pool.sort(key=lambda window: len(window[0]))
        for i in range(0, len(pool), size):
            tokens, targets = map(list, zip(*pool[i : i + size], strict=True))
            yield pad_sequence(tokens, True), pad_sequence(targets, True, IGNORE_INDEX)


@torch.inference_mode()
def nll(model: Llama, tokens_BT: Tensor, targets_BT: Tensor) -> float:
    """Return the negative log-likelihood in nats, summed over targets other than IGNORE_INDEX.

    ``tokens_BT`` and ``targets_BT`` are int64 [B, T].
    """
    weight = model.head_weight
    hidden_BTD, _ = model.model(tokens_BT.to(weight.device))
    targets_BT = targets_BT.to(weight.device)
    scored = targets_BT != IGNORE_INDEX  # the logits of other positions are not computed
    hidden_SD, targets_S = hidden_BTD[scored], targets_BT[scored]
    return loss_sum(hidden_SD[None], weight, targets_S[None]).item()
