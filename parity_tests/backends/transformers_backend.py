"""Hugging Face's Llama behind the protocol, computing in float64 throughout where asked to."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from ..support import without_weights


class LiftFloat32(torch.overrides.TorchFunctionMode):
    """Turn every cast to float32 into one to float64.

    Hugging Face's Llama computes its norms and rotary tables in float32 whatever the model's
    dtype, which would limit the comparison to some 1e-7: too coarse to see a wrong epsilon.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.view:  # not a cast: how files are read
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        lift = {torch.float32: torch.float64}
        args = tuple(lift.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: lift.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def config_from(hf: Mapping[str, Any], n_layers: int) -> Any:
    """Their config from a config.json's content.

    Without the special tokens, that a small vocabulary has no room for.
    """
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise NotImplementedError("dim is not a multiple of n_heads")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    given = {**hf, **tokens, "num_hidden_layers": n_layers}
    return transformers.LlamaConfig(**given, attn_implementation="eager")


class Transformers:
    """``LlamaForCausalLM`` with eager attention; every mask is handed over as numbers to add."""

    dtypes = ("float64", "float32", "bfloat16", "float16")

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: DynamicCache | None,
    ) -> tuple[Mapping[str, Array], DynamicCache]:
        found: dict[str, Array] = {}

        def note(name: str, value: torch.Tensor) -> None:
            found[name] = value.to(torch.promote_types(value.dtype, torch.float32)).numpy()

        model = self._model(config, params)
        with torch.no_grad(), tracing(model, note):
            _, cache = call(model, tokens, self._covered(model, positions), mask, cache)
        return found, cache

    def trace(self, *arguments: Any) -> Mapping[str, Array]:
        return self.traced_decode(*arguments, None)[0]

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
            out, cache = call(model, tokens, self._covered(model, positions), mask, cache)
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
            positions = self._covered(model, batch.positions)
            logits, _ = call(model, batch.tokens, positions, batch.mask)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        return total, {n: p.grad.numpy() for n, p in model.named_parameters()}

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

    def _covered(self, model: Any, positions: Array | None) -> Array | None:
        if positions is not None and model.dtype == torch.float32 and positions.max() > 256:
            # They multiply in float32: 4 times the bound at position 4096, 140 times at 65,536.
            raise NotImplementedError("rotary angles in float32 at large positions")
        return positions


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """Build the model of their config with parameters on the meta device."""
    with without_weights():
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    # Frequencies are no parameter: real, and not rounded with the rest.
    with LiftFloat32() if dtype == torch.float64 else nullcontext():
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def call(
    model: Any,
    tokens: Array,
    positions: Array | None,
    mask: Array | None,
    cache: DynamicCache | None = None,
) -> tuple[torch.Tensor, DynamicCache]:
    """Return logits [B, T, V] and the longer cache; ``cache`` itself is not changed."""
    dtype = model.dtype
    cache = DynamicCache() if cache is None else copy.deepcopy(cache)
    start = cache.get_seq_length()
    batch, length = tokens.shape
    if mask is None:  # left out, it would have them read jumps in positions as borders
        mask = np.tril(np.ones((1, length, start + length), bool), start)
    mask = np.broadcast_to(mask, (batch, *mask.shape[1:]))
    added = torch.zeros(mask.shape, dtype=dtype)
    added[torch.from_numpy(~mask)] = torch.finfo(dtype).min
    extra = {} if positions is None else {"position_ids": torch.from_numpy(np.array(positions))}
    with LiftFloat32() if dtype == torch.float64 else nullcontext():
        out = model(
            torch.from_numpy(np.array(tokens)),
            attention_mask=added[:, None],
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
    return out.logits, cache


@contextmanager
def tracing(model: Any, note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Give ``note`` every activation of a call under its name here, read off their modules."""
    width, prefix = model.config.head_dim, ""
    handles = []

    def heads(value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(-1, (-1, width))

    def same(value: torch.Tensor) -> torch.Tensor:
        return value

    def enter(index: int) -> None:
        nonlocal prefix
        prefix = f"layers.{index}."

    def on(module: Any, name: str, view: Any = same, of_input: bool = False) -> None:
        if of_input:
            hook = module.register_forward_pre_hook(lambda _, x: note(prefix + name, view(x[0])))
        else:
            hook = module.register_forward_hook(lambda _, x, y: note(prefix + name, view(y)))
        handles.append(hook)

    def rotary(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> Any:
        q, k = real_rotary(q, k, *rest, **more)
        note(prefix + "q_rope", q.transpose(1, 2))
        note(prefix + "k_rope", k.transpose(1, 2))
        return q, k

    def leave(*_: Any) -> None:
        nonlocal prefix
        prefix = ""

    inner = model.model
    on(inner.embed_tokens, "embed")
    for i, layer in enumerate(inner.layers):
        handles.append(layer.register_forward_pre_hook(lambda _, x, i=i: enter(i)))
        on(layer.input_layernorm, "attn_norm")
        for short in "qkv":
            on(getattr(layer.self_attn, f"{short}_proj"), short, heads)
        on(layer.self_attn.o_proj, "attn", heads, of_input=True)
        on(layer.self_attn.o_proj, "attn_proj")
        on(layer.post_attention_layernorm, "attn_residual", of_input=True)
        on(layer.post_attention_layernorm, "ffn_norm")
        on(layer.mlp.gate_proj, "gate")
        on(layer.mlp.up_proj, "up")
        on(layer.mlp.down_proj, "ffn", of_input=True)
        on(layer.mlp.down_proj, "ffn_proj")
        on(layer, "residual")
        handles.append(layer.register_forward_hook(leave))
    on(inner.norm, "norm")
    on(model.lm_head, "logits")
    real_rotary = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = rotary
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = real_rotary
        for handle in handles:
            handle.remove()


backend = Transformers()
