"""Build transformers' Llama around our weights, and take a plain training step of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_torch.model.llama import Llama
from llama_torch.model.reward import RewardModel
from llama_torch.training.batch import to_batch


def transformers_peer(model: Llama, device: torch.device) -> Any:
    """Return transformers' Llama with the model's own tensors; None where it is not installed.

    That of a reward model has one label.
    """
    try:
        import transformers
    except ImportError:
        return None
    settings: dict[str, Any] = model.config.to_hf() | {"attn_implementation": "sdpa"}
    kind: Any = transformers.LlamaForCausalLM
    if isinstance(model, RewardModel):
        settings["num_labels"] = 1
        kind = transformers.LlamaForSequenceClassification
    config = transformers.LlamaConfig(**settings)
    with torch.device("meta"):
        peer = kind(config)
    missing, extra = peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not extra
    assert set(missing) <= {"lm_head.weight"}  # tied
    peer.tie_weights()
    with device:  # its buffers are not in the state dict
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    return peer.eval()


def peer_loss(peer: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the loss that transformers' model computes from tokens and targets [B, T]."""
    targets = targets.contiguous()  # older releases call view() on them
    # shift_labels: targets that are shifted already.
    loss: Tensor = peer(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    return loss


def plain_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    window: Tensor,
    *,
    lr: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> Tensor:
    """Take a plain loop's training step on a window [B, T + 1] under autocast; return its loss."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens, targets, *_ = to_batch(window).to(device)
    with autocast(device, parameters[0].dtype, dtype):
        loss = loss_of(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def autocast(device: torch.device, weights: torch.dtype, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast to bfloat16, enabled where the weights are not of ``dtype``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != weights)
