"""Hugging Face's Llama behind the protocol, computing in float64 throughout where asked to."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from transformers import DynamicCache

from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from . import Array, Params


class LiftFloat32(torch.overrides.TorchFunctionMode):
    """Turn every cast to float32 into one to float64.

    Hugging Face's Llama computes its norms and rotary tables in float32 whatever the model's
    dtype, which would limit the comparison to some 1e-7: too coarse to see a wrong epsilon.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        lift = {torch.float32: torch.float64}
        args = tuple(lift.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: lift.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def hugging_face_config(config: LlamaConfig) -> Any:
    """Their config of ours; without the special tokens that a small vocabulary has no room for."""
    return transformers.LlamaConfig(
        **config.to_hf(), bos_token_id=None, eos_token_id=None, attn_implementation="eager"
    )


class Transformers:
    """``LlamaForCausalLM`` with eager attention; every mask is handed over as numbers to add."""

    dtypes = ("float64", "float32", "bfloat16", "float16")

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: DynamicCache | None,
    ) -> tuple[Array, DynamicCache]:
        model = self._model(config, params)
        cache = DynamicCache() if cache is None else copy.deepcopy(cache)
        with torch.no_grad():
            out = self._call(model, tokens, positions, mask, cache)
        return out.to(torch.promote_types(out.dtype, torch.float32)).numpy(), cache

    def logits(self, *arguments: Any) -> Array:
        return self.decode(*arguments, None)[0]

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        if z_loss:
            raise NotImplementedError("z-loss")
        model = self._model(config, params)
        count = sum(int(np.sum(batch.targets != -100)) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = self._call(model, batch.tokens, batch.positions, batch.mask, None)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        return total, {n: p.grad.numpy() for n, p in model.named_parameters()}

    def _model(self, config: LlamaConfig, params: Params) -> Any:
        if config.dim % config.n_heads:
            raise NotImplementedError("dim is not a multiple of n_heads")
        dtype = next(iter(params.values())).dtype
        wide = np.float32 if dtype == ml_dtypes.bfloat16 else dtype
        lift = LiftFloat32() if dtype == np.float64 else nullcontext()
        with lift:
            model = transformers.LlamaForCausalLM(hugging_face_config(config))
        tensors = {n: torch.from_numpy(v.astype(wide)) for n, v in params.items()}
        if config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        torch_dtype = (
            torch.bfloat16 if dtype == ml_dtypes.bfloat16 else tensors["lm_head.weight"].dtype
        )
        model = model.to(torch_dtype).eval()
        if dtype != np.float64:  # a cast of the model must not round the rotary frequencies
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        model.load_state_dict(tensors, strict=True)
        return model

    def _call(
        self,
        model: Any,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        dtype = model.dtype
        if positions is not None and dtype == torch.float32 and positions.max() > 256:
            # They multiply in float32: 4 times the bound at position 4096, 140 times at 65,536.
            raise NotImplementedError("rotary angles in float32 at large positions")
        start = 0 if cache is None else cache.get_seq_length()
        batch, length = tokens.shape
        if mask is None:  # left out, it would have them read jumps in positions as borders
            mask = np.tril(np.ones((1, length, start + length), bool), start)
        mask = np.broadcast_to(mask, (batch, *mask.shape[1:]))
        added = torch.zeros(mask.shape, dtype=dtype)
        added[torch.from_numpy(~mask)] = torch.finfo(dtype).min
        extra = {} if positions is None else {"position_ids": torch.from_numpy(np.array(positions))}
        lift = LiftFloat32() if dtype == torch.float64 else nullcontext()
        with lift:
            out = model(
                torch.from_numpy(tokens),
                attention_mask=added[:, None],
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            )
        return out.logits


backend = Transformers()
