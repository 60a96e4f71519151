"""AdamW for float32 master weights, stored as bfloat16 weights and their 16 lower bits.

The model computes with the nearest bfloat16 of each float32 weight; the optimizer's state holds
the other 16 bits. No weight is cast in forward or backward passes, gradients take half the memory,
and an update has the bits of float32 AdamW. Its moments can be kept in bfloat16: then they are
computed in float32, used for the update, and rounded.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.device import compiled
from ..config import OptimConfig
from ..model.llama import Llama

BLOCK = 1 << 16  # elements


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into the nearest bfloat16 (ties away from zero) and int16 lower bits."""
    bits = master.view(torch.int32)
    high = (bits + (1 << 15)) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Return the float32 tensor that ``split`` was given, bit for bit."""
    high = weight.view(torch.int16).to(torch.int32)
    return ((high << 16) + low.to(torch.int32)).view(torch.float32)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) of float32 weights split into bfloat16 and lower bits.

    Takes torch.optim.AdamW's groups; ``state`` holds ``step``, ``exp_avg`` and ``exp_avg_sq``
    as its does, and ``low``. Gradients are given to ``update``, bfloat16 or float32. ``moments``
    is the dtype that the moments are kept in, float32 or bfloat16.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments
        for group in self.param_groups:
            for parameter in group["params"]:
                self.set_master(parameter, parameter.data)

    def set_master(self, parameter: Tensor, master: Tensor) -> None:
        """Set a parameter's float32 value, and its moments to zero if it has none."""
        state = self.state[parameter]
        parameter.data, state["low"] = split(master.detach())
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(master, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(master, dtype=self.moments)

    def master(self, parameter: Tensor) -> Tensor:
        """Return a parameter's float32 value."""
        return join(parameter.detach(), self.state[parameter]["low"])

    @torch.no_grad()
    def update(self, grads: Mapping[Tensor, Tensor], scale: Tensor) -> None:
        """Update every parameter by its gradient times ``scale``, a float32 scalar."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            constants: dict[int, Tensor] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                step = int(state["step"])
                if step not in constants:
                    rates = [
                        1 - group["lr"] * group["weight_decay"],
                        group["lr"] / (1 - beta1**step),
                        (1 - beta2**step) ** -0.5,
                    ]
                    made = torch.tensor(rates, dtype=torch.float32)
                    constants[step] = made.to(parameter.device, non_blocking=True)
                run = compiled(_step, dynamic=True) if parameter.is_cuda else _step_in_blocks
                tensors = parameter, state["low"], state["exp_avg"], state["exp_avg_sq"]
                weight, low, first, second = (x.detach().view(-1) for x in tensors)
                constant = beta1, beta2, group["eps"]
                grad = grads[parameter].reshape(-1)
                run(weight, low, first, second, grad, constants[step], scale, *constant)


def _step_in_blocks(weight: Tensor, *others: Any) -> None:
    """Update one tensor in blocks, so that its twenty passes run in the CPU cache."""
    tensors, constants = (weight, *others[:4]), others[4:]
    for parts in zip(*(tensor.split(BLOCK) for tensor in tensors), strict=True):
        _step(*parts, *constants)


def _step(
    weight: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rates: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Update one tensor in place; ``rates``: decay, lr / (1 - b1^t), 1 / sqrt(1 - b2^t)."""
    wide = grad.float() * scale
    first = torch.lerp(exp_avg.float(), wide, 1 - beta1)
    second = torch.lerp(exp_avg_sq.float(), wide.square(), 1 - beta2)
    moved = rates[1] * first / (second.sqrt() * rates[2] + eps)
    new_weight, new_low = split(join(weight, low) * rates[0] - moved)
    weight.copy_(new_weight)
    low.copy_(new_low)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)


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
        moments: torch.dtype = getattr(torch, config.moments)
        return MasterAdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, moments=moments)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of training step ``step`` (from 0): warmup, then cosine decay.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)
