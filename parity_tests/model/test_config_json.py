"""Both packages read the same config.json files alike, and refuse the same ones."""

import dataclasses
import math
import operator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_torch
import reference_np.config
from llama_torch.config import TrainConfig
from llama_torch.model.config import NEUTRAL, ROPE_USES, ModelConfig
from reference_np.config import LlamaConfig

from ..backends.torch_model import torch_config
from ..conformance.architectures import configs

ERRORS = (llama_torch.InputError, reference_np.config.InputError)
HF = LlamaConfig(8, 1, 2, 1, 4, 8, 10).to_hf()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BOTH = pytest.mark.parametrize("kind", [LlamaConfig, ModelConfig])


@given(config=configs())
def test_both_read_what_either_writes(config: LlamaConfig) -> None:
    other = torch_config(config)
    for hf in (config.to_hf(), other.to_hf()):
        assert LlamaConfig.from_hf(hf) == config
        assert ModelConfig.from_hf(hf) == other


@BOTH
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.*missing low_freq",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.*missing factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "rope_scaling",
        ),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8.5}}, "original_max"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "contradicts"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "mistral"}, "model_type"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "contradictory"),
        ({"rope_theta": "1e4", "rope_parameters": {"rope_theta": 1e4}}, "contradictory"),
        ({"rope_theta": [1e4]}, "rope_theta"),
        ({"rope_scaling": [1, 2]}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters"),
        ({"rope_scaling": "default"}, "rope_scaling"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": 9, "head_dim": None}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"rms_norm_eps": None}, "missing rms_norm_eps"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"hidden_size": 8.0}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 3}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": "large"}, "rope.theta"),
        ({"rope_scaling": {"rope_type": ""}}, "rope_scaling"),
        ({"rope_parameters": {"type": ""}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "", "type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": 0}}, "rope_scaling"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings .*below 2.31"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**31}}, "original_max"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(
    kind: Any, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ERRORS, match=f"^config.json: .*{named}"):
        kind.from_hf(HF | change)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400]),
    st.sampled_from(
        [0.0, -0.0, 0.5, 1.0, 8.0, 1e-320, 1e299, 1e300, math.inf, -math.inf, math.nan]
    ),
    st.sampled_from(["", "1", "llama", "silu", *ROPE_USES, "dynamic", "\0", "\ud800"]),
    st.sampled_from([[], [1], {}, {"a": 1}]),
)
ROPE = st.builds(
    lambda rope, changes, dropped: {k: v for k, v in (rope | changes).items() if k not in dropped},
    st.sampled_from([LLAMA3, {"type": "linear", "factor": 2}, {"rope_type": "default"}]),
    st.dictionaries(st.sampled_from([*LLAMA3, "type", "rope_theta", "x"]), VALUES, max_size=2),
    st.sets(st.sampled_from(list(LLAMA3)), max_size=1),
)
PLACES = st.sampled_from(["rope_scaling", "rope_parameters"])
OTHER_KEYS = [*HF, *NEUTRAL, "sliding_window", "_x"]
CHANGES = st.builds(
    operator.or_,
    st.dictionaries(st.sampled_from(OTHER_KEYS), VALUES, max_size=3),
    st.dictionaries(PLACES, VALUES | ROPE | ROPE, max_size=2),
)


def outcome(kind: Any, hf: dict[str, Any]) -> str:
    """Return the config's fields as text (NaN equals itself there), or "refused"."""
    try:
        return repr(dataclasses.asdict(kind.from_hf(hf)))
    except ERRORS:
        return "refused"


@given(changes=CHANGES)
@settings(max_examples=10 * settings.default.max_examples)
def test_both_accept_and_refuse_the_same_values(changes: dict[str, Any]) -> None:
    assert outcome(LlamaConfig, HF | changes) == outcome(ModelConfig, HF | changes)


@BOTH
def test_old_and_plain_forms_are_read(kind: Any) -> None:
    old = dict(HF)
    for key in ("head_dim", "rope_theta", "tie_word_embeddings", "num_key_value_heads"):
        del old[key]
    config = kind.from_hf(old)
    assert (config.head_dim, config.rope_theta, config.tie_embeddings) == (4, 10000.0, False)
    assert config.n_kv_heads == config.n_heads
    new = {key: value for key, value in HF.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert kind.from_hf(new).rope_theta == 5e5
    assert kind.from_hf(HF | {"rope_scaling": None, "use_cache": True}) == kind.from_hf(HF)
    assert kind.from_hf(HF | {"unsloth_version": "2024.9"}) == kind.from_hf(HF)
    scaled = kind.from_hf(HF | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert (scaled.rope_type, scaled.rope_factor) == ("linear", 2)
    both = {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}}
    assert kind.from_hf(HF | both).rope_original_max_seq_len == 8192


@pytest.mark.parametrize(
    ("section", "change", "flag"),
    [
        ("model", {"dim": 250, "head_dim": 0}, "--dim"),
        ("model", {"head_dim": 31}, "--head-dim"),
        ("model", {"n_heads": 6, "n_kv_heads": 4, "head_dim": 8}, "--n-heads"),
        ("model", {"vocab_size": 0}, "--vocab-size"),
        ("data", {"val_fraction": 1.0}, "--val-fraction"),
        ("optim", {"lr": float("inf")}, "--lr"),
        ("optim", {"beta2": 1.0}, "--beta2"),
        ("optim", {"grad_clip": 0.0}, "--grad-clip"),
    ],
)
def test_a_bad_setting_names_its_flag(section: str, change: dict[str, Any], flag: str) -> None:
    default = getattr(TrainConfig(), section)
    with pytest.raises(llama_torch.InputError, match=f"^{flag} "):
        dataclasses.replace(default, **change)


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 4), (12, 4), (32, 4)]
)
def test_key_heads_follow_the_query_heads(n_heads: int, n_kv_heads: int) -> None:
    """The default's four wherever they did before, so that no command changes its model."""
    assert ModelConfig(dim=384, n_heads=n_heads).n_kv_heads == n_kv_heads
    assert ModelConfig().n_kv_heads == 4


@pytest.mark.parametrize(("dim", "near"), [(8, 16), (10, 16), (24, 16), (250, 240)])
def test_a_width_that_gives_an_odd_head_is_named_with_one_that_does_not(
    dim: int, near: int
) -> None:
    message = f"^--dim must be a multiple of --n-heads 8, an even one such as {near}, got {dim}"
    with pytest.raises(llama_torch.InputError, match=message):
        ModelConfig(dim=dim)


def test_widths_follow_the_dimension() -> None:
    config = ModelConfig(dim=4096, n_heads=32, n_kv_heads=32)
    assert config.head_dim == 128
    # The paper's own 7B is int(8 * 4096 / 3) = 10922 rounded up to 256: 11008; ours rounds to 32.
    assert config.hidden_dim == 10944
