"""Measure the validation loss and sample text between training steps."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..distributed.parallel import Parallel
from ..inference.config import SamplingConfig
from ..inference.engine import DecodeBatch, generate_tokens
from ..inference.rows import finish_reason
from ..model.llama import Llama
from ..tokenizer.detokenizer import Detokenizer
from .batch import Batch, to_batch
from .compile import uncompiled
from .objective import Measured, Objective, TokenLoss
from .prompt import Prompt


class Validation:
    """The validation of a model in training; ``last`` is what the last one measured."""

    def __init__(
        self,
        model: Llama,
        windows: Sequence[Tensor],
        to_batch: Callable[[Tensor], Batch],
        parallel: Parallel,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.windows = model, windows
        self.to_batch, self.parallel = to_batch, parallel
        self.objective = objective or TokenLoss()
        self.last = Measured(math.nan, {})

    @property
    def loss(self) -> float:
        """The loss that was measured last, in nats."""
        return self.last.loss

    def measure(self) -> None:
        """Measure the current weights."""
        given = self.windows, self.to_batch, self.parallel, self.objective
        self.last = measure(self.model, *given)


def validation_loss(
    model: Llama,
    windows: Sequence[Tensor],
    to_batch: Callable[[Tensor], Batch] = to_batch,
    parallel: Parallel | None = None,
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1]."""
    return measure(model, windows, to_batch, parallel).loss


@torch.no_grad()
def measure(
    model: Llama,
    windows: Sequence[Tensor],
    to_batch: Callable[[Tensor], Batch] = to_batch,
    parallel: Parallel | None = None,
    objective: Objective | None = None,
) -> Measured:
    """Return what the objective (None: the next token's loss) measures over ``windows``.

    ``to_batch`` makes each [B, ...] a micro-batch. The data ranks of ``parallel`` divide the
    windows among them, and all return the same.
    """
    parallel, objective = parallel or Parallel(), objective or TokenLoss()
    device = model.head_weight.device
    total: Tensor | None = None
    with uncompiled():
        # FSDP gathers are collective: every rank runs the same number of forward passes, and
        # discards the surplus ones.
        for first in range(0, len(windows), parallel.data_size):
            at = first + parallel.data_rank
            batch = to_batch(windows[min(at, len(windows) - 1)]).to(device)
            hidden = parallel.forward_hidden(model, batch.tokens, batch.positions, batch.mask)
            sums = objective.sums(hidden, model.head_weight, batch)
            counted = sums if at < len(windows) else torch.zeros_like(sums)
            total = counted if total is None else total + counted
    parallel.reshard(model)
    assert total is not None
    return objective.measured(parallel.all_reduce_sum_(total).tolist())


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
