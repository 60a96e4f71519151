"""Draw the models and prompts that are measured."""

import itertools

import torch

from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama

from ..shapes import SHAPES
from .timing import Setup


@torch.no_grad()
def make_model(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """Draw a model on its device, in its dtype, from N(0, 1 / fan-in).

    The trainer's initialisation would not do: its blocks add little to the residual stream, and
    with a tied head any model, right or wrong, would repeat its last token.
    """
    with torch.device("meta"):
        model = Llama(shape).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    return model


def model_for(setup: Setup, context: int) -> Llama:
    """Return a model of the setup's shape with a context of ``context`` tokens."""
    shape = SHAPES[setup.shape].to_hf() | {"max_position_embeddings": context}
    return make_model(ModelConfig.from_hf(shape), setup.torch_dtype, setup.device)


def prompts_for(model: Llama, n_rows: int, length: int) -> list[list[int]]:
    """Return ``n_rows`` different prompts of ``length`` token ids."""
    ids = itertools.count(1000)
    return [[next(ids) % model.config.vocab_size for _ in range(length)] for _ in range(n_rows)]
