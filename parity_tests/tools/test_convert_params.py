"""convert.py: params.json says every number of a config, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_parity.conversion.meta_params import config_from, hidden_width, params_of
from llama_torch.checkpoint.hf import locate
from llama_torch.model.config import ModelConfig

from ..support.meta_checkpoints import (
    LLAMA3_SCALING,
    a_meta,
)
from .commands import run_convert


@pytest.mark.parametrize(
    ("flags", "params", "length"),
    [
        ((), {"rope_theta": None}, 4096),
        ((), {"rope_theta": 1e6}, 4096),
        ((), {"rope_theta": 5e5}, 8192),
        ((), {"use_scaled_rope": True, "rope_scaling_factor": 8}, 131072),
        (("--rope-scaling-factor", 32), {"use_scaled_rope": True}, 131072),
        (("--max-seq-len", 77), {"rope_theta": 5e5, "max_seq_len": 3, "lora_args": None}, 77),
    ],
)
def test_the_context_that_params_json_lacks(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    params: dict[str, Any],
    length: int,
) -> None:
    run_convert(a_meta(tmp_path / "a", **params), tmp_path / "b", *flags)
    config, _ = locate(tmp_path / "b")
    assert config.max_seq_len == length
    assert config.rope_theta == (params.get("rope_theta", 1e4) or 1e4)
    assert config.rope_factor == (flags or (0, 8))[1] or not params.get("use_scaled_rope")
    assert f"{length}, assumed" in capsys.readouterr().out or "--max-seq-len" in flags


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [  # as released: Llama 2 7B, 13B, 70B, Llama 3 8B, Llama 3.2 1B
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (2048, 256, 1.5, 8192),
    ],
)
def test_the_feed_forward_width_of_released_models(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert hidden_width(dim, multiple_of, multiplier) == width
    params = params_of(ModelConfig(dim, 1, 8, 8, 0, width))
    assert params.get("multiple_of") == 256
    assert ("ffn_dim_multiplier" in params) == (multiplier is not None)


@given(dim=st.integers(1, 20_000), hidden=st.integers(1, 200_000))
@example(dim=4, hidden=51)  # 51 / 21 * 21 is below 51 in floating point
def test_any_feed_forward_width_can_be_said(dim: int, hidden: int) -> None:
    params = params_of(ModelConfig(2 * dim, 1, 1, 1, 0, hidden))
    # Meta's own lines, not the converter's.
    width = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == hidden


@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 400), st.integers(1, 400)),
    norm_eps=st.floats(1e-12, 1e-2),
    rope_theta=st.floats(1e-3, 1e9),
    factor=st.floats(0.125, 64),
    scaled=st.booleans(),
)
@example((1, 1), (4, 2, 5), 1e-5, 9999.0, 1.0, False)
@example((1, 2), (4, 2, 5), 1e-6, 500.0, 1.0, True)
@example((2, 2), (4, 2, 5), 1e-6, 10000.5, 0.5, True)
def test_params_json_says_every_number_of_a_config(
    heads: tuple[int, int],
    sizes: tuple[int, int, int],
    norm_eps: float,
    rope_theta: float,
    factor: float,
    scaled: bool,
) -> None:
    """Whatever lies on either side of what params.json leaves out comes back as it was."""
    n_kv_heads, n_rep = heads
    head_dim, hidden_dim, vocab_size = sizes
    config = ModelConfig(
        *(2 * head_dim * n_kv_heads * n_rep, 3, n_kv_heads * n_rep, n_kv_heads),
        *(0, hidden_dim, vocab_size, 77, norm_eps, rope_theta, False),
        **({"rope_factor": factor, **LLAMA3_SCALING} if scaled else {}),
    )
    params = json.loads(json.dumps(params_of(config)))
    assert config_from(params, Path("params.json"), 77, 0) == config
