"""ExecuTorch's own Llama, the PyTorch module that it exports, as a backend.

Tested with executorch 1.5.1 and torch 2.13.0 (``pip install executorch torch==2.13.0``; 1.9 GB).
The module is ``examples/models/llama`` of the wheel; weights are mapped by name. ``Port`` is as a
Llama is exported: neighbouring pairs are rotated, for which q and k are permuted here.
``HalfRotation`` is with ``use_hf_rope``, for others in Hugging Face's order of rows. The cache
lies in the module and is copied here. The scaling of Llama 3.1 (``use_scaled_rope``) has a fixed
low_freq_factor and original length, and is not tested.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from executorch.examples.models.llama.llama_transformer import construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from torch import nn

from llama_parity.conversion.meta_names import meta_name
from reference_np.limits import Limits

from ..backends import torch_port

REQUIRES = ("executorch==1.5.1", "torch==2.13.0")
OBJECTS = ("Port", "HalfRotation")
CONTEXT = 320  # the length of the cache and of the mask


def renamed(config: Any, in_pairs: bool, params: dict[str, Any]) -> dict[str, Any]:
    """Return ExecuTorch's parameters, by the names of Called; q and k in the rotation's order."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads} if in_pairs else {}
    found = {}
    for name, value in params.items():
        if n_heads := heads.get(name.split(".")[-2]):
            halves = value.view(n_heads, 2, -1, value.shape[1])
            value = halves.transpose(1, 2).reshape(value.shape)
        found[f"model.{meta_name(name)}"] = value
    found.setdefault("model.output.weight", found["model.tok_embeddings.weight"])
    return found


class Called(nn.Module):
    """The transformer, called with tokens, positions and mask."""

    def __init__(self, config: Any, dtype: Any, in_pairs: bool, batch: int) -> None:
        super().__init__()
        arguments = ModelArgs(
            dim=config.dim,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            hidden_dim=config.hidden_dim,
            vocab_size=config.vocab_size,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            use_hf_rope=not in_pairs,
            max_seq_len=CONTEXT,
            max_context_len=CONTEXT,
            max_batch_size=batch,
            use_kv_cache=batch > 0,
            generate_full_logits=True,
        )
        self.model = construct_transformer(arguments)
        for _, buffer in self.model.named_buffers():  # as Module.to, which the exporter calls
            if buffer.is_floating_point():
                buffer.data = buffer.to(dtype)
        self.start = 0

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        if not self.model.use_kv_cache:
            return self.model(tokens)
        at = torch.arange(self.start, self.start + tokens.shape[1])
        self.start += tokens.shape[1]
        return self.model(tokens, attn_options={"input_pos": at})


def built(config: Any, params: Any, in_pairs: bool, batch: int = 0) -> Called:
    dtype = torch_port.to_torch(params["model.norm.weight"]).dtype
    module = Called(config, dtype, in_pairs, batch)
    given = {name: torch_port.to_torch(value) for name, value in params.items()}
    weights = renamed(config, in_pairs, given)
    unexpected = module.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    return module.eval()


class Port:
    """The transformer with its own rotation of neighbouring pairs, and its KVCache."""

    in_pairs = True
    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        masks="causal",
        positions="consecutive",
        rope_types=("default",),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        with torch_port.lifted(params):
            module = built(config, params, self.in_pairs)
            return torch_port.to_numpy(module(torch.from_numpy(tokens), None, None))

    @torch.no_grad()
    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        with torch_port.lifted(params):
            module = torch_port.continued(
                cache, lambda: built(config, params, self.in_pairs, len(tokens))
            )
            return torch_port.to_numpy(module(torch.from_numpy(tokens), None, None)), module

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params, self.in_pairs)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, partial(renamed, config, self.in_pairs)
            )


class HalfRotation(Port):
    """The same with ``use_hf_rope``: the first half of a head with the second."""

    in_pairs = False
