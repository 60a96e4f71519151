"""A PyTorch port as an outsider writes it, on the shipped helpers, and with planted bugs.

It casts to float32, writes its cache in place and joins the matrices of queries, keys and values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_np.limits import Limits, real_tokens

from ..backends.torch_port import continued, lifted, loss_and_grads, to_numpy, to_torch

ROWS, COLUMNS = 3, 320  # of the cache


class Block(nn.Module):
    """One layer, whose cache it keeps and writes in place."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.n = config, 0
        self.width, self.kv = config.dim // config.n_heads, config.n_kv_heads
        rows = config.dim + 2 * self.kv * self.width

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        self.qkv, self.out = matrix(rows, config.dim), matrix(config.dim, config.dim)
        self.up, self.gate = (matrix(config.hidden_dim, config.dim) for _ in range(2))
        self.down = matrix(config.dim, config.hidden_dim)
        self.norm1, self.norm2 = matrix(config.dim), matrix(config.dim)
        shape = 2, ROWS, COLUMNS, self.kv, self.width
        self.register_buffer("cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, stores: bool) -> Tensor:
        h = norm(x, self.norm1, self.config.norm_eps)
        heads = F.linear(h, self.qkv).unflatten(-1, (-1, self.width))
        q, k, v = heads.split([self.config.n_heads, self.kv, self.kv], dim=2)
        q, k = turn(q, angles), turn(k, angles)
        if stores:
            batch, length = x.shape[:2]
            self.cache[:, :batch, self.n : self.n + length] = torch.stack([k, v])
            self.n += length
            k, v = self.cache[:, :batch, : self.n]
        k, v = (part.repeat_interleave(self.config.n_rep, dim=2) for part in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / self.width**0.5
        weights = scores.masked_fill(~mask[:, None], -torch.inf).float().softmax(-1).to(x.dtype)
        x = x + F.linear(torch.einsum("bhts,bshk->bthk", weights, v).flatten(2), self.out)
        h = norm(x, self.norm2, self.config.norm_eps)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)


class Model(nn.Module):
    """Left padding, one start position for the batch, Llama 2's rotary embedding."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, dtype) for _ in range(config.n_layers))
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim, dtype=dtype))
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.dim, dtype=dtype))
        self.norm = nn.Parameter(torch.empty(config.dim, dtype=dtype))

    def forward(
        self, tokens: Tensor, positions: Any = None, mask: Any = None, stores: bool = False
    ) -> Tensor:
        start, length = (self.layers[0].n if stores else 0), tokens.shape[1]
        first = start if positions is None else int(positions[0, 0])
        width = self.config.dim // self.config.n_heads
        pairs = torch.arange(0, width, 2, dtype=torch.float32)
        inv_freq = 1.0 / self.config.rope_theta ** (pairs / width)
        at = torch.arange(first, first + length, dtype=torch.float32)
        seen = torch.ones(length, start + length, dtype=torch.bool).tril(start)[None]
        if mask is not None:  # [B, S], the attention_mask of others
            seen = (seen & mask[:, None]) | torch.eye(start + length, dtype=torch.bool)[start:]
        x = self.embed[tokens]
        for layer in self.layers:
            x = layer(x, at[:, None] * inv_freq, seen, stores)
        return F.linear(norm(x, self.norm, self.config.norm_eps), self.head)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def convert(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's parameters by name, from the protocol's."""
    embed = params["model.embed_tokens.weight"]
    found = {"embed": embed, "head": params.get("lm_head.weight", embed)}
    found["norm"] = params["model.norm.weight"]
    for i in range(sum("q_proj" in name for name in params)):
        layer = {n.split(".")[-2]: v for n, v in params.items() if f"layers.{i}." in n}
        joined = torch.cat([layer[f"{n}_proj"] for n in "qkv"])
        parts = {"qkv": joined, "out": layer["o_proj"], "norm1": layer["input_layernorm"]}
        parts |= {n: layer[f"{n}_proj"] for n in ("up", "gate", "down")}
        parts["norm2"] = layer["post_attention_layernorm"]
        found |= {f"layers.{i}.{name}": value for name, value in parts.items()}
    return found


class InPlace:
    """The model as a backend; its cache is written in place."""

    dtypes = ("float64", "float32", "bfloat16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="left padding",
        positions="shifted",
        cache="in place",
        rope_types=("default",),
        context=4096,
        batch=ROWS,
        float32_angles=("float32",),
    )

    def fresh(self, config: Any, params: Any) -> Model:
        with torch.no_grad():
            tensors = convert({name: to_torch(value) for name, value in params.items()})
            model = Model(config, tensors["embed"].dtype)
            model.load_state_dict(tensors)
        return model

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        real = None if mask is None else to_torch(real_tokens(mask))
        model = self.fresh(config, params)
        with torch.no_grad(), lifted(params):
            return to_numpy(model(to_torch(tokens), positions, real))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        model = self.fresh(config, params) if cache is None else cache
        real = None if mask is None else to_torch(real_tokens(mask))
        with torch.no_grad(), lifted(params):
            return to_numpy(model(to_torch(tokens), positions, real, stores=True)), model

    def loss_and_grads(self, config: Any, params: Any, batches: Any, z_loss: float) -> Any:
        with lifted(params):
            return loss_and_grads(self.fresh(config, params), params, batches, z_loss, convert)


class AsValue(InPlace):
    """The same model, each call on a copy of it: its cache is a value."""

    limits = Limits(**vars(InPlace.limits) | {"cache": "value"})

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        module = continued(cache, lambda: self.fresh(config, params))
        return super().decode(config, params, tokens, positions, mask, module)


class InPlaceSaidToBeAValue(InPlace):
    """The first model, declared as one whose cache is a value."""

    limits = AsValue.limits


class CacheOverwritten(InPlace):
    """Every call after the prompt's writes over the newest token."""

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        for layer in cache.layers if cache is not None and len(tokens[0]) == 1 else ():
            layer.cache[:, :, layer.n - 1] = 0.0
        return super().decode(config, params, tokens, positions, mask, cache)


class PaddingSeen(InPlace):
    """Padding that the tokens after it see."""

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return super().logits(config, params, tokens, positions, None)
