"""The whole model's gradients, against autograd of two models."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from reference_np import optim
from reference_np.config import LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.ops import IGNORE
from reference_np.tolerances import FLOAT64_TOLERANCE

from ..conformance.training_cases import TrainingCase, max_abs, training_cases
from ..planted.operations import scaled
from ..support.torch_training import torch_grads

pytestmark = pytest.mark.numeric


def independent_loss(params: dict[str, torch.Tensor], batch: Batch, config: LlamaConfig) -> Any:
    """Return the loss of a Llama written in torch primitives and complex rotations."""
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    length, half = tokens.shape[1], config.head_dim // 2
    positions = np.arange(length)[None] if batch.positions is None else batch.positions
    causal = np.tril(np.ones((1, length, length), bool))
    mask = torch.from_numpy(causal if batch.mask is None else batch.mask)
    turn = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = scaled(turn, config)
    turn = torch.polar(torch.ones(()).double(), torch.from_numpy(positions)[..., None] * turn)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * x * (x.square().mean(-1, keepdim=True) + config.norm_eps) ** -0.5

    def rotate(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x[..., :half], x[..., half:]) * turn[:, :, None]
        return torch.cat([z.real, z.imag], -1)

    x = params["model.embed_tokens.weight"][tokens]
    for i in range(config.n_layers):
        p = {n.split(".", 3)[3]: v for n, v in params.items() if n.startswith(f"model.layers.{i}.")}
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            torch.einsum("btd,ed->bte", h, p[f"self_attn.{n}_proj.weight"]).unflatten(
                -1, (-1, config.head_dim)
            )
            for n in "qkv"
        )
        reader = torch.arange(config.n_heads) // config.n_rep  # which key head each query reads
        q, k, v = rotate(q), rotate(k)[:, :, reader], v[:, :, reader]
        weight = torch.exp(torch.einsum("bthk,bshk->bhts", q, k) * config.head_dim**-0.5)
        weight = weight * mask[:, None]
        total = weight.sum(-1, keepdim=True)
        weight = weight / torch.where(total == 0, 1.0, total)
        mixed = torch.einsum("bhts,bshk->bthk", weight, v).flatten(2)
        x = x + mixed @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = h @ p["mlp.gate_proj.weight"].T
        hidden = gate / (1 + torch.exp(-gate)) * (h @ p["mlp.up_proj.weight"].T)
        x = x + hidden @ p["mlp.down_proj.weight"].T
    x = norm(x, params["model.norm.weight"])
    head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
    probabilities = torch.softmax(x @ head.T, -1)[targets != IGNORE]
    wanted = targets[targets != IGNORE]
    return -probabilities[torch.arange(len(wanted)), wanted].log().mean()


@given(case=training_cases())
def test_a_third_voice_differentiates_the_same(case: TrainingCase) -> None:
    batch = case.batches[0]
    loss, grads = loss_and_grads(case.params, batch, case.config)
    tensors = {n: torch.tensor(v, requires_grad=True) for n, v in case.params.items()}
    theirs = independent_loss(tensors, batch, case.config)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=FLOAT64_TOLERANCE)
    for name, tensor in tensors.items():
        difference = max_abs(grads[name] - tensor.grad.numpy())
        assert difference <= FLOAT64_TOLERANCE * max(max_abs(grads[name]), 1e-3), name


@given(case=training_cases())
def test_loss_and_gradients_in_float64(case: TrainingCase) -> None:
    loss, grads = optim.accumulate(case.params, case.batches, case.config, case.hyper.z_loss)
    torch_loss, their_grads = torch_grads(case, np.float64)
    assert torch_loss == pytest.approx(loss, rel=FLOAT64_TOLERANCE)
    for name, expected in grads.items():
        scale = max(max_abs(expected), 1e-3 * max(map(max_abs, grads.values())))
        assert max_abs(their_grads[name] - expected) <= FLOAT64_TOLERANCE * scale, name
