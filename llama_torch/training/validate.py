"""Measure the validation loss and sample text between training steps."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..distributed.parallel import Parallel
from ..inference.config import SamplingConfig
from ..inference.engine import DecodeBatch, finish_reason, generate_tokens
from ..model.llama import Llama
from ..model.loss import count_valid, loss_sum
from ..tokenizer.detokenizer import Detokenizer
from .batch import Batch, to_batch
from .compile import uncompiled
from .source import Prompt


class Validation:
    """The validation loss of a model in training; ``loss`` is the last one measured."""

    def __init__(
        self,
        model: Llama,
        windows: Sequence[Tensor],
        to_batch: Callable[[Tensor], Batch],
        parallel: Parallel,
    ) -> None:
        self.model, self.windows = model, windows
        self.to_batch, self.parallel = to_batch, parallel
        self.loss = math.nan

    def measure(self) -> None:
        """Measure the loss of the current weights, in nats per token."""
        self.loss = validation_loss(self.model, self.windows, self.to_batch, self.parallel)


@torch.no_grad()
def validation_loss(
    model: Llama,
    windows: Sequence[Tensor],
    to_batch: Callable[[Tensor], Batch] = to_batch,
    parallel: Parallel | None = None,
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1].

    ``to_batch`` splits windows into tokens and targets [B, T]. The data ranks of ``parallel``
    divide the windows among them, and all return the same loss.
    """
    parallel = parallel or Parallel()
    device = model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    with uncompiled():
        # FSDP gathers are collective: every rank runs the same number of forward passes, and
        # discards the surplus ones.
        for first in range(0, len(windows), parallel.data_size):
            at = first + parallel.data_rank
            batch = to_batch(windows[min(at, len(windows) - 1)])
            tokens, targets, positions, mask = batch.to(device)
            hidden = parallel.forward_hidden(model, tokens, positions, mask)
            loss = loss_sum(hidden, model.head_weight, targets)
            if at < len(windows):
                total += torch.stack([loss, loss.new_full((), count_valid(batch.targets))])
    parallel.reshard(model)
    loss, n_valid = parallel.all_reduce_sum_(total).tolist()
    mean: float = loss / n_valid
    return mean


def sample_text(
    model: Llama,
    make_prompt: Callable[[], Prompt],
    seed: int,
    step: int,
    parallel: Parallel | None = None,
) -> str:
    """Return a prompt and 40 tokens after it, or those up to an end token, which is shown.

    The draw is a function of (seed, step).
    """
    if parallel and parallel.is_sharded:
        return "(no sample: no process holds the whole model)"
    if parallel and not parallel.is_main_process:
        return ""
    if model.config.max_seq_len < 2:
        return "(no sample: the context holds a single token)"
    prompt = make_prompt()
    tokenizer = prompt.tokenizer
    if model.config.vocab_size < tokenizer.n_ids:
        return "(no sample: the vocabulary is smaller than the encoding's)"
    prompt_ids = prompt.ids[: model.config.max_seq_len - 1]
    settings = SamplingConfig(max_new_tokens=40, seed=seed * 1_000_003 + step)
    text, end = Detokenizer(tokenizer, prompt_ids), ""
    with uncompiled():
        # A captured decoding step would keep its cache in GPU memory between samples.
        batch = DecodeBatch(model, [prompt_ids], [settings], decoding="eager")
        pieces = []
        for token in generate_tokens(batch, partial(finish_reason, stop_ids=prompt.end_ids)):
            if token.id in prompt.end_ids:
                end = tokenizer.names.get(token.id, "")
            else:
                pieces.append(text.push(token.id))
    return prompt.text + "".join(pieces) + text.finish() + end
