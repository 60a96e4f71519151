"""compare.py: agreement of correct implementations, for all values and ranges of layers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llama_parity.comparison import torch_side
from llama_parity.comparison.inputs import make_calls
from llama_torch.checkpoint.hf import load_model, locate, read_tensor
from reference_np.config import LlamaConfig

from ..backends.torch_model import save_numpy
from ..backends.transformers_backend import backend as transformers
from .comparing import CALLS, CONFIG, NAMES, QUICK, Edited, Offering, named, write


@pytest.mark.parametrize("against", ["torch", "torch:float64", "torch:bfloat16", "torch:float16"])
def test_an_honest_checkpoint_passes(ckpt: Path, run: Callable, against: str) -> None:
    code, out, err = run(ckpt, "--against", against)
    assert (code, err) == (0, "")
    n = CALLS * (len(NAMES) + ("float64" not in against))  # and the logits' KL
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} activations within bounds")
    assert not any(name in out.replace(out.splitlines()[-1], "") for name in NAMES if "." in name)
    everything = run(ckpt, "--against", against, "--all")[1]
    for name in NAMES:
        rows = [line for line in everything.splitlines() if not line.startswith("logits of")]
        assert sum(row.split()[:1] == [name] for row in rows) == CALLS
    # After the table: a sentence about the logits of each call, one about padding, the verdict.
    assert max(map(len, everything.splitlines()[1 : -CALLS - 2])) <= 100


@pytest.mark.parametrize("against", ["hf:float64", "hf", "hf:bfloat16", "transformers"])
def test_hugging_faces_llama_passes(tmp_path: Path, run: Callable, against: str) -> None:
    near = LlamaConfig(32, 2, 4, 2, 8, 48, 300, max_seq_len=64, tie_embeddings=True)
    code, out, err = run(write(tmp_path / "near.safetensors", near), "--against", against)
    assert (code, err) == (0, "")
    assert f"PASS: {CALLS * (len(NAMES) + ('float64' not in against))} of " in out


def test_hugging_faces_float32_angles_are_a_documented_difference(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    """Transformers multiplies position and frequency in float32; undeclared, that is named."""
    found = report(ckpt, "--against", "hf")
    assert found["verdict"]["holds"], found["verdict"]["line"]
    documented = [row for row in found["rows"] if row["status"] == "documented"]
    assert {found["calls"][row["call"]]["name"] for row in documented} == {"position 2,040 on"}
    assert "as declared: within that product's bound" in found["warnings"]
    found = report(ckpt, "--against", offer(Offering(transformers, "traced_decode", "logits")))
    assert found["first_divergence"]["name"] == "layers.0.q_rope"
    assert found["calls"][found["first_divergence"]["call"]]["name"] == "position 2,040 on"
    assert named(found) == [["rope_angles_float32"]]
    assert found["unexplained"] == 0
    errors = "errors are those of rotary angles that are multiplied in float32"
    assert errors in found["warnings"]


def test_a_misread_config_is_seen(
    ckpt: Path, report: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side reads the file by its own means; here the oracle misreads it."""
    real = LlamaConfig.from_hf

    def misread(hf: dict[str, Any], source: str = "") -> LlamaConfig:
        return dataclasses.replace(real(hf, source), rope_theta=1e4)

    monkeypatch.setattr(LlamaConfig, "from_hf", misread)
    for against in ("torch", "hf:float64"):
        found = report(ckpt, "--against", against, *QUICK, "--no-diagnose")
        assert found["first_divergence"]["name"] == "layers.0.q_rope"


@pytest.mark.parametrize("zero", ["lm_head", "model.embed", "weight"])
def test_zeros_are_compared(ckpt: Path, run: Callable, zero: str) -> None:
    """Where everything is zero, so is every bound, and every ratio is 0 / 0."""
    tensors = {n: v * (zero not in n) for n, v in load_file(ckpt).items()}
    path = ckpt.with_name("zero.safetensors")
    save_numpy(tensors, path, {"config": CONFIG.to_json()})
    code, out, _ = run(path, *QUICK, "--grads")
    assert code == 0
    assert "No further step is judged: the gradient of" in out
    assert run(path, *QUICK, "--against", ckpt)[0] == 1


def test_a_streamed_model_computes_as_a_loaded_one(
    ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no parameter before or after, and one module's while that runs."""
    real, streamed = torch_side.stream_weights, []
    monkeypatch.setattr(
        torch_side,
        "stream_weights",
        lambda model, *rest: (streamed.append(model), real(model, *rest)),
    )
    config, files = locate(ckpt)
    cpu = torch.device("cpu")
    forward = torch_side.llama_forward(
        config, lambda n: read_tensor(files[n].file, n, torch.float32), cpu
    )
    found: dict[str, torch.Tensor] = {}
    call = make_calls(np.arange(6), CONFIG, (6,), 0)[0]
    with torch.inference_mode():
        assert all(p.is_meta for p in streamed[0].parameters())
        forward(call, None, found.__setitem__)
        assert all(p.is_meta for p in streamed[0].parameters())
        expected, _ = load_model(ckpt)(torch.from_numpy(call.tokens))
    assert torch.equal(found["logits"], expected)


@pytest.mark.parametrize("edit", [lambda x: None, lambda x: x * np.nan, lambda x: x[:, :-1]])
def test_a_range_needs_something_to_begin_from(
    ckpt: Path, run: Callable, offer: Callable, edit: Callable
) -> None:
    spec = offer(Edited("layers.0.residual", edit))
    code, _, err = run(ckpt, "--against", spec, "--layers", "1", "--tokens", 4, "--steps", 0)
    assert code == 2
    assert "--layers 1: layers.0.residual of the call '4 tokens' is missing, misshapen" in err


def test_a_range_of_layers(tmp_path: Path, report: Callable, offer: Callable) -> None:
    """Errors before the range are not its own; the head belongs to the last layer."""
    ckpt = write(tmp_path / "three.safetensors", dataclasses.replace(CONFIG, n_layers=3))
    spec = offer(Edited("layers.0.residual", lambda x: x * 1.5))
    assert not report(ckpt, "--against", spec, *QUICK, "--no-diagnose")["verdict"]["holds"]
    found = report(ckpt, "--layers", "1:2")
    assert found["verdict"]["holds"]
    kinds = [name for name in NAMES if name.startswith("layers.1.")]
    assert {row["name"] for row in found["rows"]} == set(kinds)
    assert found["verdict"]["expected"] == CALLS * len(kinds)
    found = report(ckpt, "--layers", "2:", *QUICK)
    assert {row["name"] for row in found["rows"]} >= {"layers.2.q", "norm", "logits"}
    # Layer 1's first operations read another stream than the trace shows.
    found = report(ckpt, "--against", spec, "--layers", "1", *QUICK)
    wrong = {row["name"] for row in found["rows"] if row["status"] == "diverges"}
    assert wrong == {"layers.1.attn_norm", "layers.1.attn_residual"}
