"""transformers' LlamaForCausalLM on a GPU: its attentions, and with Liger's kernels.

Tested with transformers 5.17.0, torch 2.11.0 (CUDA 13) and liger-kernel 0.8.5, all of that machine
(``--python python3``). ``Sdpa`` has torch choose its kernel. ``Flash`` has flash attention alone
where the prompt has neither mask nor cache, and elsewhere what torch chooses.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from reference_np.limits import Limits, real_tokens

from ..backends import torch_port

REQUIRES = ("transformers==5.17.0", "torch==2.11.0", "liger-kernel==0.8.5")
OBJECTS = ("Eager", "Sdpa", "Flash", "Liger")
NEEDS_GPU = True


class OnDevice(torch.nn.Module):
    """The model, called with NumPy's tokens, positions, mask of padded rows, and a cache."""

    def __init__(self, config: Any, params: Any, attention: str, device: str) -> None:
        super().__init__()
        keys = {**config.to_hf(), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
        self.model = LlamaForCausalLM(LlamaConfig(**keys | {"attn_implementation": attention}))
        tensors = {name: torch_port.to_torch(value) for name, value in params.items()}
        dtype = next(iter(tensors.values())).dtype
        self.model.to(dtype).load_state_dict(tensors, strict=not config.tie_embeddings)
        self.model.tie_weights()
        # The rotary frequencies stay in float32, whatever the parameters' dtype is.
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
        self.model.to(device).eval()
        self.device = device

    def forward(self, tokens: Any, positions: Any, mask: Any, cache: Any = None) -> Any:
        given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if positions is not None:
            given["position_ids"] = torch.from_numpy(np.array(positions)).to(self.device)
        if mask is not None:
            given["attention_mask"] = torch.from_numpy(real_tokens(mask)).long().to(self.device)
        ids = torch.from_numpy(np.array(tokens)).to(self.device)
        return self.model(ids, use_cache=cache is not None, **given).logits


class Eager:
    """``attn_implementation="eager"``."""

    attention = "eager"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="padding",
        # A prompt of other positions without a mask is taken for several documents.
        positions="shifted",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def _model(self, config: Any, params: Any) -> OnDevice:
        return OnDevice(config, params, self.attention, self.device)

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        with torch.no_grad():
            return torch_port.to_numpy(self._model(config, params)(tokens, positions, mask))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        cache = DynamicCache() if cache is None else copy.deepcopy(cache)
        with torch.no_grad():
            out = self._model(config, params)(tokens, positions, mask, cache)
        return torch_port.to_numpy(out), cache

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        if z_loss:
            raise NotImplementedError("z-loss")
        whole = self._model(config, params)
        count = sum(int(np.sum(batch.targets != -100)) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = whole(batch.tokens, batch.positions, batch.mask)
            targets = torch.from_numpy(batch.targets).to(self.device).flatten()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        named = whole.model.named_parameters()
        return total, {name: torch_port.to_numpy(p.grad) for name, p in named}


class Sdpa(Eager):
    """``attn_implementation="sdpa"``, the default."""

    attention = "sdpa"


class OnFlash(OnDevice):
    """The model, whose causal prompts are computed by torch's flash attention or not at all."""

    def forward(self, tokens: Any, positions: Any, mask: Any, cache: Any = None) -> Any:
        is_prompt = mask is None and not (cache and cache.get_seq_length())
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_prompt else nullcontext():
            return super().forward(tokens, positions, mask, cache)


class Flash(Sdpa):
    """``attn_implementation="sdpa"`` inside ``sdpa_kernel(SDPBackend.FLASH_ATTENTION)``."""

    dtypes: Any = ("bfloat16", "float16")
    limits = dataclasses.replace(Eager.limits, float32_angles=("bfloat16", "float16"))

    def _model(self, config: Any, params: Any) -> OnDevice:
        return OnFlash(config, params, self.attention, self.device)


class Liger(Sdpa):
    """Liger's kernels in the place of the rotation, the norms and SwiGLU."""

    def _model(self, config: Any, params: Any) -> OnDevice:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        whole = super()._model(config, params)
        patch: Callable[..., Any] = partial(_apply_liger_kernel_to_instance, rope=True)
        patch(model=whole.model, fused_linear_cross_entropy=False)
        return whole
