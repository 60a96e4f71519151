"""Hugging Face's Llama as a backend, in float64 throughout for float64 parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from llama_parity.comparison.float64 import LiftFloat32
from llama_parity.comparison.transformers_model import call, config_from, empty_model, tracing
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.limits import Limits

from .mixins import LogitsByDecode, TraceByTracedDecode


class Transformers(LogitsByDecode, TraceByTracedDecode):
    """``LlamaForCausalLM`` with eager attention; masks are passed as terms of the scores."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    # transformers multiplies position and frequency in float32. In float64 that is lifted.
    limits = Limits(head_dim="dim a multiple of n_heads", float32_angles=("float32",))

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: DynamicCache | None,
    ) -> tuple[Mapping[str, Array], DynamicCache]:
        activations: dict[str, Array] = {}

        def trace(name: str, value: torch.Tensor) -> None:
            activations[name] = value.to(torch.promote_types(value.dtype, torch.float32)).numpy()

        model = self._model(config, params)
        with torch.no_grad(), tracing(model, trace):
            _, cache = self._call(model, tokens, positions, mask, cache)
        return activations, cache

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
        with torch.no_grad():
            out, cache = self._call(model, tokens, positions, mask, cache)
        return out.to(torch.promote_types(out.dtype, torch.float32)).numpy(), cache

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        kind = getattr(torch, dtype)
        model = LlamaForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="eager")
        if kind == torch.float64:
            with LiftFloat32():  # the rotary frequencies, which transformers computes in float32
                model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

        def logits(tokens: Array) -> Array:
            with torch.no_grad():
                out, _ = call(model, tokens, None, None)
            return out.to(torch.promote_types(out.dtype, torch.float32)).numpy()

        return logits

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        if z_loss:
            raise NotImplementedError("z-loss")
        model = self._model(config, params)
        count = sum(int(np.sum(batch.targets != -100)) for batch in batches)
        total = 0.0
        for batch in batches:
            logits, _ = self._call(model, batch.tokens, batch.positions, batch.mask, None)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        return total, {n: p.grad.numpy() for n, p in model.named_parameters()}

    def _call(
        self,
        model: Any,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: DynamicCache | None,
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Return the logits [B, T, V] of tokens and the cache with them added."""
        return call(model, tokens, positions, mask, cache)

    def _model(self, config: LlamaConfig, params: Params) -> Any:
        dtype = next(iter(params.values())).dtype
        wide = np.float32 if dtype == ml_dtypes.bfloat16 else dtype
        tensors = {n: torch.from_numpy(v.astype(wide)) for n, v in params.items()}
        if config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        low = torch.bfloat16 if dtype == ml_dtypes.bfloat16 else tensors["lm_head.weight"].dtype
        model = empty_model(config_from(config.to_hf(), config.n_layers), low)
        model.load_state_dict({n: v.to(low) for n, v in tensors.items()}, strict=True, assign=True)
        model.tie_weights()  # assigning made two parameters of a tied one
        return model.requires_grad_(True)


backend = Transformers()
