"""compare.py: the place of a wrong weight, and bounds that no wrong value is within."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_parity.comparison import judging
from reference_np.config import LlamaConfig
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.tolerances import Errors, composed_bound, errors_and_bounds

from ..backends.torch_model import save_numpy
from ..conformance.strategies import cast, random_params
from ..planted.port import Planted
from .comparing import CONFIG, NAMES, QUICK, QUICK_CALLS, Edited, write

ONE_OF_EACH = [n for n in parameter_shapes(CONFIG) if "layers" not in n or "layers.1" in n]
# The first activation that a wrong weight changes.
FIRST_SEEN = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attn_proj",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "ffn_proj",
    "lm_head": "logits",
    "model.norm": "norm",
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_corrupted_weight_is_found_where_it_is(
    ckpt: Path, report: Callable, name: str, dtype: str
) -> None:
    """One element of one tensor is off by 1.0 on the torch side."""
    tensors = load_file(ckpt)
    damaged = tensors[name].copy()
    # Row 32 is the id of a space: a token that the default text holds.
    damaged[(32, 1) if damaged.shape[0] == 300 else (1,) * damaged.ndim] += 1.0
    other = ckpt.with_name("other.safetensors")
    save_numpy(tensors | {name: damaged}, other, {"config": CONFIG.to_json()})
    found = report(ckpt, "--against", other, "--dtype", dtype, "--tokens", 24, "--steps", 0)
    seen = next(place for part, place in FIRST_SEEN.items() if part in name)
    layer = name.split(".")[2] if ".layers." in name else None
    place = seen if layer is None else f"layers.{layer}.{seen}"
    assert found["first_divergence"]["name"] == place
    assert {row["name"] for row in found["rows"] if row["status"] == "diverges"} == {place}
    assert found["diagnosis"] == []  # no known bug does that
    assert found["unexplained"] == found["diverging"] > 0
    heat = found["heatmap"]
    worst = np.array(heat["error"]).max(axis=0)
    if seen not in ("embed", "attn_norm", "ffn_norm", "norm"):
        assert (worst > 0.01 * worst.max()).sum() == 1  # one output channel


def test_a_baseline_that_overflowed_excuses_nothing() -> None:
    """It allows no error, and is left out beside a baseline that did not overflow."""
    exact = np.random.default_rng(0).standard_normal((2, 3, 8))
    over, close = exact.astype(np.float32), exact.astype(np.float32)
    none = composed_bound(Errors(0, 0, 0), "float32")
    for bad in (np.inf, -np.inf, np.nan):
        over[1, 2, 3] = bad
        assert judging.error_bound(exact, [over], "float32") == none
        both = judging.error_bound(exact, [over, close], "float32")
        assert both == judging.error_bound(exact, [close], "float32")
        assert both.rms > none.rms
        allowed = np.full_like(exact, bad)
        error, limit = errors_and_bounds(exact * 1.5, exact, allowed)
        assert error.rms == pytest.approx(0.5)
        assert not error.within(limit)


def test_a_wrong_model_that_overflows_in_the_baseline_fails(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """In float16 these logits are infinite; the other side's are finite, and wrong."""

    class Wide(Planted):
        dtypes = ("float16",)

        def traced_decode(self, config: Any, params: Any, *rest: Any) -> Any:
            wide = {name: params[name].astype(np.float32) for name in params}
            found, cache = super().traced_decode(config, wide, *rest)
            return found | {"logits": found["logits"] * np.float32(1.5)}, cache

    config = LlamaConfig(16, 1, 2, 1, 8, 24, 60)
    params = random_params(config, 0)
    params["lm_head.weight"] *= 1e5
    params = {name: np.clip(value, -6e4, 6e4) for name, value in params.items()}
    save_numpy(cast(params, np.float32), tmp_path / "x.safetensors", {"config": config.to_json()})
    found = report(tmp_path / "x.safetensors", "--against", offer(Wide()), *QUICK)
    rows = [row for row in found["rows"] if row["name"] == "logits"]
    assert {row["status"] for row in rows} == {"diverges"}
    for row in rows:
        bounds = [row[part]["bound"]["rms"] for part in ("inherited", "fresh")]
        assert max(bounds) < 0.1


def test_the_bound_of_attentions_sums_is_attentions_alone(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """Any order of a sum over 500 keys errs by 22 roundings; no other operation may, by 20."""

    class Rough(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            return {name: rough(name, value) for name, value in found.items()}, cache

    def rough(name: str, value: np.ndarray) -> np.ndarray:
        signs = np.random.default_rng([*name.encode()]).choice([-1, 1], value.shape)
        return (value * (1 + 20 * 2.0**-24 * signs)).astype(np.float32)

    config = dataclasses.replace(CONFIG, n_layers=1)
    path = write(tmp_path / "one.safetensors", config)
    argv = ("--against", offer(Rough()), "--tokens", 500, "--steps", 0, "--no-diagnose")
    rows = [row for row in report(path, *argv)["rows"] if row["call"] == 0 and row["fresh"]]
    assert len(rows) == len(activation_axes(config))
    assert {row["name"] for row in rows if row["status"] != "diverges"} <= {"layers.0.attn"}


@pytest.mark.parametrize("name", ["embed", *(n for n in NAMES if "s.1." in n), "norm", "logits"])
@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (lambda x: None, "missing"),
        (lambda x: x * np.nan, "not finite"),
        (lambda x: np.full_like(x, np.inf), "not finite"),
        (lambda x: x[:, :-1], "misshapen"),
        (lambda x: x[..., None], "misshapen"),
        (lambda x: x[:0], "misshapen"),
    ],
)
def test_what_cannot_be_compared_fails(
    ckpt: Path, report: Callable, offer: Callable, name: str, edit: Callable, status: str
) -> None:
    argv = ("--against", offer(Edited(name, edit)), "--tokens", 4, "--steps", 0, "--no-diagnose")
    found = report(ckpt, *argv)
    wrong = {row["name"] for row in found["rows"] if row["status"] not in ("ok", "inherits")}
    assert wrong == ({"logits", "logits.kl"} if name == "logits" else {name})
    assert found["first_divergence"]["name"] == name
    assert {row["status"] for row in found["rows"] if row["name"] == name} == {status}
    n = QUICK_CALLS * (len(NAMES) + 1)
    lost = QUICK_CALLS * (1 + (name == "logits"))
    assert (found["verdict"]["compared"], found["verdict"]["expected"]) == (n - lost, n)


def test_nan_on_both_sides_fails(ckpt: Path, run: Callable) -> None:
    tensors = load_file(ckpt)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    broken = ckpt.with_name("nan.safetensors")
    save_numpy(tensors, broken, {"config": CONFIG.to_json()})
    code, out, _ = run(broken)
    assert code == 1
    assert "first divergence at layers.1.up (48 tokens): the up projection (not finite)" in out
