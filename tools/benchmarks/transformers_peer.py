"""transformers' Llama as a peer: around our weights, and a plain training step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_torch.model.llama import Llama
from llama_torch.training.batch import to_batch


def transformers_peer(model: Llama, device: torch.device) -> Any:
    """Build transformers' Llama around the very same tensors; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    settings: dict[str, Any] = model.config.to_hf() | {"attn_implementation": "sdpa"}
    config = transformers.LlamaConfig(**settings)
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    missing, extra = peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not extra
    assert set(missing) <= {"lm_head.weight"}  # tied
    peer.tie_weights()
    with device:  # its tables are no part of the state
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    return peer.eval()


def peer_loss(peer: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the peer's own loss."""
    targets = targets.contiguous()  # older releases view them
    # shift_labels: the targets as they are, without the peer's own shift.
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
    """Take the step of a plain training loop, under autocast to the dtype; return its loss."""
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
    """Return the context in which float32 weights multiply in bfloat16; weights of it need none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != weights)
