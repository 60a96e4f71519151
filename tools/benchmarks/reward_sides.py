"""The sides of bench.py's work "reward": a reward model's step on pairs of answers, and TRL's.

A step learns MICRO_BATCHES times as many pairs as a training step has windows. Both sides take them
in micro-batches of the same number of pairs: ours with the longest pairs first, as our trainer, TRL
in a random order.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llama_torch.config import TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.reward import RewardModel
from llama_torch.training.compile import compile_blocks
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.pair_loading import Pairs
from llama_torch.training.pair_objective import MARGINS, PairLoss
from llama_torch.training.pair_source import pair_batch, pair_batches
from llama_torch.training.step import train_step

from .transformers_peer import transformers_peer
from .trl_peer import PAD, trl_reward_step

REWARD = "ours, on pairs"
TRL_REWARD = "TRL, on pairs"
MICRO_BATCHES = 4
SHORTEST = 8  # of the context's length a conversation has one part in so many, at least
MARGIN = "small"


def bench_pairs(model: ModelConfig, batch_size: int) -> Pairs:
    """Return the pairs of a step, drawn: a common prompt of half of the shorter one's length.

    Lengths are drawn evenly on a logarithmic scale, from an eighth of the context to all of it: few
    conversations are long.
    """
    rng, n = np.random.default_rng(1), MICRO_BATCHES * batch_size
    context = model.max_seq_len
    least = max(2, context // SHORTEST)
    lengths = np.exp(rng.uniform(np.log(least), np.log(context), (n, 2))).astype(int)
    tokens = []
    for pair in lengths:
        prompt = rng.integers(PAD + 1, model.vocab_size, pair.min() // 2)
        tokens += [
            np.concatenate([prompt, rng.integers(PAD + 1, model.vocab_size, m - len(prompt))])
            for m in pair
        ]
    columns = np.zeros((2 * n, 3), np.int64)
    columns[:, 0], columns[:, 2] = np.repeat(rng.integers(0, 4, n), 2), -1
    starts = np.cumsum([0, *map(len, tokens)])
    places = [f"pair {i}" for i in range(n)]
    return Pairs(np.concatenate(tokens).astype(np.int32), starts, columns, places)


def reward_trunk(model: ModelConfig, batch_size: int) -> ModelConfig:
    """Return the config whose operations are counted: no tied head, and pairs' mean length."""
    length = round(float(bench_pairs(model, batch_size).lengths.mean()))
    return replace(model, tie_embeddings=False, max_seq_len=length)


def reward_model(model: Llama) -> RewardModel:
    """Return a reward model with a language model's trunk, and a head drawn from a seed."""
    made = RewardModel(model.config)
    made.model = model.model
    weight = model.model.norm.weight
    drawn = torch.randn(1, model.config.dim, generator=torch.Generator().manual_seed(2))
    made.score.weight.data = (drawn / model.config.dim**0.5).to(weight)
    return made


def ours_on_pairs(model: Llama, window: Tensor, config: TrainConfig) -> Callable[[], Tensor]:
    """Return our step on the pairs, in the trainer's micro-batches."""
    ours, rows = reward_model(model), len(window)
    optimizer = make_adamw(ours, config.optim, getattr(torch, config.dtype))
    compile_blocks(ours, config.compile, config.recompute)
    windows = pair_batches(bench_pairs(config.model, rows), rows)
    objective, optim = PairLoss(MARGIN), config.optim

    def step() -> Tensor:
        batches = [pair_batch(part) for part in windows]
        given = ours, optimizer, batches
        return train_step(*given, lr=optim.lr, grad_clip=optim.grad_clip, objective=objective)[0]

    return step


def trl_on_pairs(model: Llama, window: Tensor, config: TrainConfig) -> Callable[[], Tensor]:
    """Return TRL's step on the same pairs with the same margins."""
    peer = transformers_peer(reward_model(model), model.head_weight.device)
    if peer is None:
        sys.exit("transformers is not installed")
    pairs = bench_pairs(config.model, len(window))
    rows = [
        pairs.tokens[a:b].tolist() for a, b in zip(pairs.starts, pairs.starts[1:], strict=False)
    ]
    margins = [MARGINS[MARGIN][strength] for strength in pairs.columns[::2, 0]]
    return trl_reward_step(peer, rows, margins, len(window), config)
