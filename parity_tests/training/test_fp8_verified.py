"""--verify-every compares the products in fp8 of a run with the oracle's, and stops a wrong one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_torch import train
from llama_torch.model import float8_linear
from llama_torch.model.config import ModelConfig
from llama_torch.model.float8_linear import use_float8
from llama_torch.model.llama import Llama
from llama_torch.training import float8_check, loop, step, verify
from llama_torch.training.batch import to_batch

from ..support.trainer_runs import scalars, unsampled_run

pytestmark = pytest.mark.numeric

Patch = pytest.MonkeyPatch
FP8 = ["--dim", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2", "--hidden-dim"]
FP8 += ["48", "--precision", "fp8", "--verify-every", "2"]


def model_and_tokens(dtype: torch.dtype, seed: int) -> tuple[Llama, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = Llama(ModelConfig(64, 3, 4, 2, 16, 96, vocab_size=61, max_seq_len=48))
    model.init_weights(generator)
    use_float8(model.to(dtype))
    return model, torch.randint(61, (2, 49), generator=generator)


def scale_left_out(patch: Patch) -> None:
    real, one = float8_linear.multiply, torch.ones(())
    patch.setattr(
        float8_linear, "multiply", lambda a, a_scale, b, _, dtype: real(a, a_scale, b, one, dtype)
    )


def e5m2_forward(patch: Patch) -> None:
    patch.setattr(float8_linear, "FORWARD", torch.float8_e5m2)


def e4m3_backward(patch: Patch) -> None:
    patch.setattr(float8_linear, "BACKWARD", torch.float8_e4m3fn)


def weight_scale_in_the_weight_gradient(patch: Patch) -> None:
    real, scales = float8_linear.multiply, list[Tensor]()

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *rest: Any) -> Tensor:
        scales.append(b_scale)
        return real(a, a_scale, b, scales[-2] if len(scales) % 3 == 0 else b_scale, *rest)

    patch.setattr(float8_linear, "multiply", multiply)


def gradient_of_the_rows_reversed(patch: Patch) -> None:
    real, calls = float8_linear.multiply, list[None]()

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, *rest: Any) -> Tensor:
        calls.append(None)
        if len(calls) % 3 == 0:
            a = a.view(torch.uint8).flip(1).view(a.dtype)
        return real(a, a_scale, b, *rest)

    patch.setattr(float8_linear, "multiply", multiply)


def stale_scale(patch: Patch) -> None:
    real = float8_linear.multiplier_of
    patch.setattr(float8_linear, "multiplier_of", lambda largest, dtype: 4 * real(largest, dtype))


def first_row_alone(patch: Patch) -> None:
    """Take the largest value of the first row; what is beyond the range saturates."""
    real = float8_linear.quantize

    def quantize(matrices: Any, dtype: torch.dtype) -> Any:
        largest = matrices[0][0].abs().max()
        return real([x.clamp(-largest, largest) for x in matrices], dtype)

    patch.setattr(float8_linear, "quantize", quantize)


def truncated(patch: Patch) -> None:
    real = float8_linear.quantize

    def quantize(matrices: Any, dtype: torch.dtype) -> Any:
        bits = 20 if dtype == torch.float8_e4m3fn else 21
        cut = [x.float().view(torch.int32) >> bits << bits for x in matrices]
        return real([x.view(torch.float32) for x in cut], dtype)

    patch.setattr(float8_linear, "quantize", quantize)


FAULTS: list[Callable[[Patch], None]] = [
    scale_left_out,
    e5m2_forward,
    e4m3_backward,
    weight_scale_in_the_weight_gradient,
    gradient_of_the_rows_reversed,
    stale_scale,
    first_row_alone,
    truncated,
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dtypes
def test_products_of_a_model_are_the_oracles(dtype: torch.dtype) -> None:
    """Two blocks of four products, each with the gradients of its input and its matrices."""
    for seed in range(4):
        model, tokens = model_and_tokens(dtype, seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = float8_check.float8_errors(model, tokens)
        assert len(found) == 2 * (4 * 2 + 7)
        assert all(error.holds for error in found), max(found, key=lambda e: e.share)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@dtypes
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_out_of_bounds(
    fault: Callable[[Patch], None], dtype: torch.dtype, monkeypatch: Patch
) -> None:
    model, tokens = model_and_tokens(dtype, 0)
    fault(monkeypatch)
    assert not all(error.holds for error in float8_check.float8_errors(model, tokens))


def test_the_rest_of_a_check_is_in_the_models_own_precision(monkeypatch: Patch) -> None:
    model, tokens = model_and_tokens(torch.float32, 0)
    assert all(error.holds for error in verify.check(model, [to_batch(tokens)], 0.0))
    e5m2_forward(monkeypatch)
    errors = verify.check(model, [to_batch(tokens)], 0.0)
    assert {error.quantity for error in errors if not error.holds} == {"fp8_products"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [scale_left_out, e5m2_forward])
def test_a_run_is_stopped_where_its_products_go_wrong(
    fault: Callable[[Patch], None],
    dtype: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real, taken = tmp_path / "run", step.train_step, list[None]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        if len(taken) == 3:
            fault(monkeypatch)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    flags = [*unsampled_run(tmp_path), *FP8, "--dtype", dtype, "--grad-clip", "1e-6"]
    assert train.main([*flags, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "step     2  verified" in captured.out
    assert captured.err.startswith("error: step 4: the model does not compute what the oracle does")
    assert "fp8_products" in captured.err
    assert captured.err.count("\n") == 1
    seen = scalars(out)
    errors, bounds = (dict(seen[f"verify/fp8_products_{kind}"]) for kind in ("error", "bound"))
    assert errors[2] <= bounds[2]
    assert errors[4] > bounds[4]


def test_a_verified_run_is_the_unverified_one(tmp_path: Path) -> None:
    flags = [*unsampled_run(tmp_path), *FP8]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert train.main([*flags, "--verify-every", "0", "--out", str(tmp_path / "b")]) == 0
    found, wanted = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(found[tag]) == dict(wanted[tag])
