"""Gradients under bfloat16 autocast: no worse than an independent implementation's."""

from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import given, settings

from llama_torch import step
from reference_np.grad import Batch, loss_and_grads
from reference_np.tolerances import FACTOR, FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from .backends.torch_backends import to_torch
from .backends.transformers_backend import config_from
from .strategies import Case, Params, wide_cases
from .support import torch_model


def peer(case: Case, params: Params, dtype: torch.dtype) -> Any:
    model = transformers.LlamaForCausalLM(config_from(case.config.to_hf(), case.config.n_layers))
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    if case.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.to(dtype)


def peer_arguments(case: Case) -> dict[str, torch.Tensor]:
    extra = {"attention_mask": torch.ones(case.tokens.shape, dtype=torch.long)}
    if case.positions is not None:
        extra["position_ids"] = torch.from_numpy(case.positions)
    return extra


@given(case=wide_cases(for_transformers=True))
@settings(max_examples=25)
def test_gradients_under_bfloat16_autocast(case: Case) -> None:
    """The trainer's default where the hardware has it; rms over all gradients together."""
    rounded = {name: v.astype(np.float32).astype(np.float64) for name, v in case.params.items()}
    targets = np.roll(case.tokens, -1, axis=1)
    batch = Batch(case.tokens, targets, case.positions)
    _, exact = loss_and_grads(rounded, batch, case.config)

    model = torch_model(case.config, {n: v.astype(np.float32) for n, v in rounded.items()})
    model.requires_grad_(True)
    precision = step.Precision(torch.device("cpu"), torch.bfloat16)
    step.accumulate(model, [to_torch(batch)], precision)

    theirs = peer(case, rounded, torch.float32)
    with precision.autocast():
        logits = theirs(torch.from_numpy(case.tokens), **peer_arguments(case)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()

    def error(found: Any) -> float:
        named = {name: p.grad.double().numpy() for name, p in found.named_parameters()}
        wrong = sum(np.sum((named[name] - value) ** 2) for name, value in exact.items())
        return float(np.sqrt(wrong / sum(np.sum(value**2) for value in exact.values())))

    floor = FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"]
    mine, plain = error(model), error(theirs)
    assert 0 < mine <= FACTOR * plain + floor, f"{mine}, plain {plain}"
    assert mine < 0.1  # and small in itself: a lost term would be of the gradient's own size
