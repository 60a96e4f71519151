"""TransformerLens' TransformerBridge of a Llama: raw, and with the norms folded into the matrices.

Tested with transformer-lens 4.3.0, transformers 5.23.0 and torch 2.13.0 (``pip install
transformer-lens==4.3.0 transformers==5.23.0 torch==2.13.0``). The bridge computes the attention
itself, of transformers' modules. ``Compatibility`` folds the norms into the matrices; the
unembedding is left uncentred, which would shift all logits of a token.
"""

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache, PreTrainedTokenizerFast

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.limits import Limits

from ..backends import torch_port
from .transformers_5 import Sdpa

REQUIRES = ("transformer-lens==4.3.0", "transformers==5.23.0", "torch==2.13.0")
OBJECTS = ("Port", "Compatibility", "Directory")
VARIABLES = {"HF_HUB_OFFLINE": "1"}


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with a tokenizer, which is not used and would be fetched otherwise."""
    made = tempfile.TemporaryDirectory()
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(made.name)
    return made


def context(dtype: Any) -> Any:
    return LiftFloat32() if dtype == torch.float64 else nullcontext()


class Port(Sdpa):
    """``TransformerBridge`` with the weights as they are."""

    attention = "eager"
    limits = Limits(
        head_dim="dim a multiple of n_heads", masks="padding", float32_angles=("float32",)
    )
    trace: Any = None  # its hooks are not asked
    traced_decode: Any = None

    def _model(self, config: Any, params: Any) -> Any:
        model = super()._model(config, params)
        with context(model.dtype):
            return TransformerBridge.boot_transformers(
                folder().name, hf_model=model, device="cpu", dtype=model.dtype
            )

    def _call(
        self, model: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        cache = DynamicCache() if cache is None else copy.deepcopy(cache)
        more = {} if positions is None else {"position_ids": torch.from_numpy(positions)}
        if mask is not None:
            more["attention_mask"] = self._given(mask)
        dtype = next(model.parameters()).dtype
        with context(dtype):
            return model(
                torch.from_numpy(tokens),
                return_type="logits_and_cache",
                past_key_values=cache,
                **more,
            )

    def loss_and_grads(self, *_: Any) -> Any:
        raise NotImplementedError("gradients are those of transformers' parameters")


class Compatibility(Port):
    """The same after ``enable_compatibility_mode``."""

    def _model(self, config: Any, params: Any) -> Any:
        bridge = super()._model(config, params)
        with context(next(bridge.parameters()).dtype), torch.no_grad():
            bridge.enable_compatibility_mode(disable_warnings=True, center_unembed=False)
        return bridge


class Directory:
    """``TransformerBridge.boot_transformers`` of a folder."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        kind = getattr(torch, dtype)
        bridge = TransformerBridge.boot_transformers(path, device="cpu", dtype=kind)
        if kind == torch.float64:
            inner = bridge.original_model.model
            with LiftFloat32():  # the rotary frequencies, which transformers computes in float32
                rotary = inner.rotary_emb
                rotary = getattr(rotary, "original_component", rotary)
                rotary.__init__(rotary.config)

        @torch.no_grad()
        def logits(tokens: Any) -> Any:
            with context(kind):
                return torch_port.to_numpy(bridge(torch.from_numpy(tokens)))

        return logits
