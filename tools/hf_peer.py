"""transformers' Llama as a peer: around our weights, and its training step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_torch.config import OptimConfig
from llama_torch.model import Llama
from llama_torch.optim import make_adamw
from llama_torch.step import Precision, split_window


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


def peer_step(peer: Any, window: Tensor, precision: Precision) -> Callable[[], Tensor]:
    """Return the same training step with the peer's own loss, which the call returns."""
    optimizer = make_adamw(peer, OptimConfig())

    def step() -> Tensor:
        tokens, targets, *_ = split_window(window.to(precision.device))
        targets = targets.contiguous()  # older releases view them
        with precision.autocast():
            # shift_labels: the targets as they are, without the peer's own shift.
            loss: Tensor = peer(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
