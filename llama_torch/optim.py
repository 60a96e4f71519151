"""AdamW with decay on matrices only, and the warmup-cosine schedule."""

import math

import torch

from .config import OptimConfig
from .master_adamw import MasterAdamW
from .model import Llama


def make_adamw(
    model: Llama, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW | MasterAdamW:
    """Build AdamW (Loshchilov and Hutter 2019) with the paper's betas and eps (section 2.2).

    Norm weights are not decayed: they are scales near one, not weights near zero. With
    ``dtype`` bfloat16 the model's float32 parameters become bfloat16; the optimizer keeps what
    they lose (see MasterAdamW).
    """
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    if dtype == torch.bfloat16:
        return MasterAdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the rate of step ``step`` (from 0): linear warmup, then cosine to the final rate.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)
