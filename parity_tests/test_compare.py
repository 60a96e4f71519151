"""compare.py: agreement where there is one, the right place where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reference_np.config import LlamaConfig
from reference_np.naming import activation_axes, parameter_shapes
from tools import compare

from .strategies import cast, random_params

CONFIG = LlamaConfig(32, 3, 4, 2, 8, 48, 300)
# Where a wrong weight must first show.
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


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.safetensors"
    save_file(cast(random_params(CONFIG, 0), np.float32), path, {"config": CONFIG.to_json()})
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = compare.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_honest_checkpoint_passes(ckpt: Path, run: Callable, dtype: str) -> None:
    code, out, err = run(ckpt, "--dtype", dtype)
    assert (code, err) == (0, "")
    n = len(activation_axes(CONFIG))
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} activations within bounds")
    for name in activation_axes(CONFIG):
        assert any(line.split()[0] == name for line in out.splitlines() if line.strip())
    assert "DIVERGES" not in out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list(parameter_shapes(CONFIG)))
def test_a_corrupted_weight_is_found_where_it_is(
    ckpt: Path, run: Callable, name: str, dtype: str
) -> None:
    """One element of one tensor, on the torch side, off by as much as its tensor's size."""
    tensors = load_file(ckpt)
    damaged = tensors[name].copy()
    # Row 32 is the id of a space: a token that the default text holds.
    damaged[(32, 1) if damaged.shape[0] == 300 else (1,) * damaged.ndim] += 1.0
    other = ckpt.with_name("other.safetensors")
    save_file(tensors | {name: damaged}, other, {"config": CONFIG.to_json()})
    code, out, _ = run(ckpt, "--against", other, "--dtype", dtype)
    seen = next(place for part, place in FIRST_SEEN.items() if part in name)
    layer = name.split(".")[2] if ".layers." in name else None
    expected = seen if layer is None else f"layers.{layer}.{seen}"
    assert code == 1
    last = out.splitlines()[-1]
    assert last.startswith("FAIL: ")
    assert f"first divergence at {expected} " in last


def test_missing_activations_fail(
    ckpt: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare.traced_activations

    def forgetful(*args: object) -> dict:
        return {k: v for k, v in real(*args).items() if k != "layers.1.k_rope"}

    monkeypatch.setattr(compare, "traced_activations", forgetful)
    code, out, _ = run(ckpt)
    assert code == 1
    assert "first divergence at layers.1.k_rope (missing or not finite)" in out
    monkeypatch.setattr(compare, "traced_activations", lambda *args: {})
    assert run(ckpt)[0] == 1


def test_nan_on_both_sides_fails(ckpt: Path, run: Callable) -> None:
    tensors = load_file(ckpt)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    broken = ckpt.with_name("nan.safetensors")
    save_file(tensors, broken, {"config": CONFIG.to_json()})
    code, out, _ = run(broken)
    assert code == 1
    assert "first divergence at layers.1.up (missing or not finite)" in out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_training_step_is_compared(ckpt: Path, run: Callable, dtype: str) -> None:
    code, out, err = run(ckpt, "--grads", "--dtype", dtype)
    assert (code, err) == (0, "")
    n = len(activation_axes(CONFIG)) + 2 + 2 * len(parameter_shapes(CONFIG))
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} quantities within bounds")
    assert "grad layers.2.self_attn.k_proj" in out
    assert "step lm_head" in out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_gradient_is_named(
    ckpt: Path, run: Callable, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One KV head's gradient lost, as if only one of its readers had been counted."""
    real = compare.accumulate

    def lossy(model: Any, *args: Any) -> Any:
        loss = real(model, *args)
        model.model.layers[1].self_attn.k_proj.weight.grad[:8] *= 0.5
        return loss

    monkeypatch.setattr(compare, "accumulate", lossy)
    code, out, _ = run(ckpt, "--grads", "--dtype", dtype)
    assert code == 1
    assert "first divergence at grad_norm" in out
    diverging = [
        line.split()[1] for line in out.splitlines() if "grad " in line and "DIVERGES" in line
    ]
    assert diverging == ["layers.1.self_attn.k_proj"]


def test_a_missing_gradient_fails(
    ckpt: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare.torch_step
    name = "grad model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(
        compare, "torch_step", lambda *a: {k: v for k, v in real(*a).items() if k != name}
    )
    code, out, _ = run(ckpt, "--grads")
    assert code == 1
    assert f"first divergence at {name} (missing or not finite)" in out


def test_nothing_compared_is_not_a_pass() -> None:
    assert compare.verdict([], 0)[1] == 1
    assert compare.verdict([], 5)[1] == 1


def test_an_epsilon_ten_times_smaller_is_seen(ckpt: Path, run: Callable, monkeypatch) -> None:
    real = compare.load_model

    def wrong_epsilon(*args: object, **kwargs: object) -> object:
        model = real(*args, **kwargs)
        model.model.layers[1].post_attention_layernorm.eps = 1e-6
        return model

    monkeypatch.setattr(compare, "load_model", wrong_epsilon)
    code, out, _ = run(ckpt)
    assert code == 1
    assert "first divergence at layers.1.ffn_norm " in out


def test_real_text_and_prompts(tmp_path: Path, run: Callable) -> None:
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 50257, max_seq_len=16, tie_embeddings=True)
    path = tmp_path / "gpt2.safetensors"
    save_file(cast(random_params(config, 0), np.float32), path, {"config": config.to_json()})
    assert "16 tokens" in run(path)[1]  # no more than the context
    code, out, _ = run(path, "--prompt", "Hello world")
    assert code == 0
    assert "2 tokens" in out


def test_bad_input_is_one_line(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    other = LlamaConfig(32, 3, 4, 2, 8, 48, 300, rope_theta=5e5)
    save_file(load_file(ckpt), tmp_path / "other.safetensors", {"config": other.to_json()})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ckpt.read_bytes()[:-1])
    for argv, message in (
        (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
        ([broken], "not a complete safetensors file"),
        ([ckpt, "--against", broken], "not a complete safetensors file"),
        ([ckpt, "--against", tmp_path / "other.safetensors"], "another architecture"),
        ([ckpt, "--prompt", "text"], "--prompt needs the GPT-2 encoding"),
        ([ckpt, "--tokens", "0"], "--tokens must be positive"),
        ([ckpt, "--tokens", "1", "--grads"], "--grads needs --tokens 2"),
        ([ckpt, "--dtype", "float8"], "float8"),
        ([], "CKPT"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
