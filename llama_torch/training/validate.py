"""Measure the validation loss, and sample text, in between steps."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed.parallel import Parallel
from ..inference.config import SamplingConfig
from ..inference.engine import generate
from ..model.llama import Llama
from ..model.loss import count_valid, loss_sum
from ..tokenizer.gpt2 import VOCAB_SIZE, gpt2_ids, located
from ..tokenizer.tokenizer import Gpt2
from .batch import Batch, to_batch
from .compile import uncompiled


class Validation:
    """The validation loss of a model in training: ``loss``, as last measured."""

    def __init__(
        self,
        model: Llama,
        windows: Sequence[Tensor],
        cut: Callable[[Tensor], Batch],
        parallel: Parallel,
    ) -> None:
        self.model, self.windows, self.cut, self.parallel = model, windows, cut, parallel
        self.loss = math.nan

    def measure(self) -> None:
        """Measure the loss of the model as it is now."""
        self.loss = validation_loss(self.model, self.windows, self.cut, self.parallel)


@torch.no_grad()
def validation_loss(
    model: Llama,
    windows: Sequence[Tensor],
    cut: Callable[[Tensor], Batch] = to_batch,
    parallel: Parallel | None = None,
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1].

    ``cut`` makes tokens and targets [B, T] of a window. The processes of ``parallel`` share the
    windows out, and all return the same.
    """
    parallel = parallel or Parallel()
    device = model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    with uncompiled():
        # Shards are gathered together: all take as many, the last ones perhaps in vain.
        for first in range(0, len(windows), parallel.data_size):
            at = first + parallel.data_rank
            batch = cut(windows[min(at, len(windows) - 1)])
            tokens, targets, positions, mask = batch.to(device)
            hidden = parallel.hidden(model, tokens, positions, mask)
            loss = loss_sum(hidden, model.head_weight, targets)
            if at < len(windows):
                total += torch.stack([loss, loss.new_full((), count_valid(batch.targets))])
    parallel.reshard(model)
    loss, n_valid = parallel.total(total).tolist()
    found: float = loss / n_valid
    return found


def sample_text(
    model: Llama, prompt: str, seed: int, step: int, parallel: Parallel | None = None
) -> str:
    """Return ``prompt`` and 40 tokens after it; the draw is a function of (seed, step)."""
    if parallel and parallel.is_sharded:
        return "(no sample: no process holds the whole model)"
    if parallel and not parallel.is_main_process:
        return ""
    if model.config.vocab_size < VOCAB_SIZE:
        return "(no sample: the vocabulary is smaller than the encoding's)"
    with located("--sample-prompt"):
        prompt_ids = gpt2_ids(prompt)[: model.config.max_seq_len - 1]
    settings = SamplingConfig(max_new_tokens=40, seed=seed * 1_000_003 + step)
    with uncompiled():
        # A captured step would keep its cache in a GPU's memory between samples.
        ids = generate(model, prompt_ids, settings, decoding="eager")
        return prompt + Gpt2().decode(ids)
