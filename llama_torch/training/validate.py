"""Validation loss, and a sample of text, in between steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import TrainConfig
from ..distributed.parallel import Parallel
from ..inference.config import SamplingConfig
from ..inference.engine import generate
from ..model.llama import Llama
from ..model.loss import count_valid, loss_sum
from ..tokenizer.gpt2 import VOCAB_SIZE, gpt2_ids, located
from ..tokenizer.tokenizer import Gpt2
from . import compile as speedup
from .batch import Batch, split_window


@torch.no_grad()
def evaluate(
    model: Llama,
    windows: Sequence[Tensor],
    split: Callable[[Tensor], Batch] = split_window,
    parallel: Parallel | None = None,
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1].

    The processes of ``parallel`` share them out, and all return the same.
    """
    parallel = parallel or Parallel()
    device = model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    with speedup.uncompiled():
        # Shards are gathered together: all take as many, the last ones perhaps in vain.
        for first in range(0, len(windows), parallel.data_size):
            at = first + parallel.data_rank
            batch = split(windows[min(at, len(windows) - 1)])
            tokens, targets, positions, mask = batch.to(device)
            hidden = parallel.hidden(model, tokens, positions, mask)
            loss = loss_sum(hidden, model.head_weight, targets)
            if at < len(windows):
                total += torch.stack([loss, loss.new_full((), count_valid(batch.targets))])
    parallel.reshard(model)
    loss, n_valid = parallel.total(total).tolist()
    found: float = loss / n_valid
    return found


def sample(model: Llama, config: TrainConfig, step: int, parallel: Parallel | None = None) -> str:
    """Write 40 tokens after the sample prompt; the draw is a function of (seed, step)."""
    if parallel and parallel.is_sharded:
        return "(no sample: no process holds the whole model)"
    if parallel and not parallel.is_main_process:
        return ""
    if config.model.vocab_size < VOCAB_SIZE:
        return "(no sample: the vocabulary is smaller than the encoding's)"
    with located("--sample-prompt"):
        prompt = gpt2_ids(config.sample_prompt)[: config.model.max_seq_len - 1]
    settings = SamplingConfig(max_new_tokens=40, seed=config.seed * 1_000_003 + step)
    with speedup.uncompiled():
        # A captured step would keep its cache in a GPU's memory between samples.
        ids = generate(model, prompt, settings, decoding="eager")
        return config.sample_prompt + Gpt2().decode(ids)
