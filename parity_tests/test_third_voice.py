"""Both backends against Hugging Face's Llama: two by one hand could share one mistake."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.tolerances import LOGIC, logic_error

from .strategies import (
    Array,
    Params,
    configs,
    left_padded,
    params_of,
    positions_of,
    random_params,
    tokens_of,
)

transformers = pytest.importorskip("transformers", reason="the third voice is transformers")


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


def hugging_face(config: LlamaConfig, params: Params) -> Any:
    with LiftFloat32():
        model = transformers.LlamaForCausalLM(hugging_face_config(config)).double().eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float64
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model


def hugging_face_logits(model: Any, tokens: Array, **arguments: Array) -> Array:
    tensors = {name: torch.from_numpy(value) for name, value in arguments.items()}
    with torch.no_grad(), LiftFloat32():
        out = model(torch.from_numpy(tokens), **tensors, use_cache=False)
    assert out.logits.dtype == torch.float64
    return out.logits.numpy()


@given(config=configs(for_transformers=True), data=st.data())
def test_oracle_equals_hugging_face(config: LlamaConfig, data: st.DataObject) -> None:
    params = data.draw(params_of(config))
    tokens = data.draw(tokens_of(config))
    positions = data.draw(st.none() | positions_of(*tokens.shape))
    model = hugging_face(config, params)
    # Without an attention mask, transformers reads jumps in the positions as document borders.
    extra = {"attention_mask": np.ones_like(tokens)}
    if positions is not None:
        extra["position_ids"] = positions
    theirs = hugging_face_logits(model, tokens, **extra)
    ours, _ = forward(params, tokens, config, positions=positions)
    assert logic_error(ours, theirs) <= LOGIC


@given(config=configs(for_transformers=True), data=st.data())
def test_left_padding_equals_hugging_face(config: LlamaConfig, data: st.DataObject) -> None:
    params = data.draw(params_of(config))
    tokens = data.draw(tokens_of(config))
    batch, length = tokens.shape
    lengths = [data.draw(st.integers(1, length), label="row length") for _ in range(batch)]
    lengths[0] = length
    positions, mask = left_padded(lengths)
    real = np.arange(length) >= length - np.array(lengths)[:, None]
    model = hugging_face(config, params)
    theirs = hugging_face_logits(
        model, tokens, attention_mask=real.astype(np.int64), position_ids=positions
    )
    ours, _ = forward(params, tokens, config, positions=positions, mask=mask)
    for row in range(batch):  # what a padding position computes means nothing
        assert logic_error(ours[row][real[row]], theirs[row][real[row]]) <= LOGIC


def test_without_the_lift_the_comparison_is_coarse() -> None:
    """The lift matters: as it stands, Hugging Face's float64 is float32 inside."""
    config = LlamaConfig(16, 2, 4, 2, 4, 40, 30)
    params = random_params(config, 0)
    tokens = np.arange(10)[None]
    ours, _ = forward(params, tokens, config)
    hf = transformers.LlamaForCausalLM(hugging_face_config(config)).double()
    hf.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    with torch.no_grad():
        theirs = hf(torch.from_numpy(tokens)).logits.numpy()
    assert LOGIC < logic_error(ours, theirs) < 1e-5
