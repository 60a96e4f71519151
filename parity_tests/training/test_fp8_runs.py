"""Runs with --precision fp8: resumed, recomputed, compiled, evaluated, and refused."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_common.errors import InputError
from llama_torch import evaluate, generate, train
from llama_torch.model.config import ModelConfig
from llama_torch.model.float8_linear import use_float8, uses_float8, without_float8
from llama_torch.model.llama import Llama
from llama_torch.training import setup, step, verify
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.validate import validation_loss

from ..support import state_files
from ..support.trainer_runs import refused, scalars, state_file, stop_after, unsampled_run

pytestmark = pytest.mark.numeric

Patch = pytest.MonkeyPatch
SHAPE = ["--dim", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2"]
FP8 = [*SHAPE, "--hidden-dim", "48", "--precision", "fp8"]
BFLOAT16 = ["--dtype", "bfloat16"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return [*unsampled_run(tmp_path), *FP8]


def small_model(dtype: torch.dtype = torch.float32, tied: bool = True) -> Llama:
    """Return a model that trains in fp8."""
    shape = ModelConfig(32, 2, 4, 2, 8, 48, vocab_size=61, max_seq_len=32, tie_embeddings=tied)
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    use_float8(model.to(dtype))
    return model


def draw_batch(rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return to_batch(torch.randint(61, (rows, 33), generator=generator))


def gradients(model: Llama, batches: list[Batch]) -> list[Tensor]:
    """Return the loss, and copies of every parameter's gradient."""
    model.zero_grad()
    total, grads = step.accumulate(model, batches)
    return [total, *(grads[p].clone() for p in model.parameters())]


@pytest.mark.parametrize("more", [[], [*BFLOAT16, "--grad-accum", "2", "--batch-size", "1"]])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    more: list[str], tmp_path: Path, flags: list[str], monkeypatch: Patch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train.main([*flags, *more, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert train.main([*flags, *more, "--out", str(parted)]) == 130
    assert train.main(["--resume", "--out", str(parted)]) == 0
    found, expected = load_file(state_file(parted)), load_file(state_file(whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(scalars(parted)[tag]) == dict(scalars(whole)[tag])


def test_precision_is_the_runs_own(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one is refused; a run of a version without it goes on, and as it began."""
    out, own = tmp_path / "run", tmp_path / "own"
    assert train.main([*flags, "--out", str(out)]) == 0
    assert "float32 (block products in fp8, slower than" in capsys.readouterr().out
    error = refused(["--resume", "--out", str(out), "--precision", "dtype"], capsys)
    assert "--precision is fp8 there and dtype here" in error
    assert train.main([*flags, "--precision", "dtype", "--out", str(own)]) == 0
    assert dict(scalars(own)["train/loss"]) != dict(scalars(out)["train/loss"])
    assert "fp8" not in capsys.readouterr().out
    record = state_files.read(own / "run.json")
    for table in ("settings", "identity"):
        assert record[table].pop("precision") == "dtype"
    state_files.write(own / "run.json", record)
    error = refused(["--resume", "--out", str(own), "--precision", "fp8"], capsys)
    assert "--precision is dtype there and fp8 here" in error
    assert train.main(["--resume", "--out", str(own), "--steps", "7"]) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dim", "40", "--n-heads", "5", "--n-kv-heads", "5"], "--dim must be a multiple of 16"),
        (["--hidden-dim", "40"], "--hidden-dim must be a multiple of 16 in fp8, got 40"),
        (["--max-seq-len", "24"], "--max-seq-len must be a multiple of 16 in fp8, got 24"),
        (["--n-kv-heads", "1"], "--n-kv-heads times head_dim must be a multiple of 16 in fp8"),
        (["--tp", "2"], "--tp must be 1 with --precision fp8, got 2"),
        (["--precision", "fp4"], "--precision"),
    ],
)
def test_what_has_no_products_in_fp8_is_refused(
    more: list[str],
    says: str,
    tmp_path: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert says in refused([*flags, *more, "--out", str(out)], capsys)
    assert not out.exists()


def test_a_gpu_without_fp8_is_refused(
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(InputError, match="--precision fp8: A100 has no fp8 products"):
        setup.require_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    setup.require_fp8(torch.device("cuda"))


def test_a_dry_run_and_a_file_of_settings(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('precision = "fp8"\n')
    own = flags[: flags.index("--precision")]
    assert train.main([*own, "--config", str(config), "--dry-run"]) == 0
    assert "float32 (block products in fp8" in capsys.readouterr().out


def test_what_was_trained_is_any_model(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated, generated from, and begun from, as one of another run is."""
    out, next_out = tmp_path / "run", tmp_path / "next"
    assert train.main([*flags, "--no-tie-embeddings", "--out", str(out)]) == 0
    on_cpu = ["--ckpt", str(out), "--device", "cpu"]
    assert evaluate.main(on_cpu) == 0
    assert generate.main([*on_cpu, "--prompt", "The", "--max-new-tokens", "4"]) == 0
    begun = [*flags[: flags.index("--dim")], "--init-from", str(out), "--precision", "fp8"]
    text = ["--data", str(tmp_path / "text.txt"), "--max-seq-len", "16", "--steps", "2"]
    more = [*text, "--device", "cpu", "--warmup-steps", "1", "--out", str(next_out)]
    assert begun == ["--init-from", str(out), "--precision", "fp8"]
    assert train.main([*begun, *more]) == 0
    assert "block products in fp8" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_and_text_are_in_the_models_own_precision(dtype: torch.dtype) -> None:
    model, windows = small_model(dtype), [torch.randint(61, (2, 33))]
    found = validation_loss(model, windows)
    trained = gradients(model, [draw_batch(2)])
    with without_float8(model):
        assert not uses_float8(model)
        assert validation_loss(model, windows) == found
        own = gradients(model, [draw_batch(2)])
    assert uses_float8(model)
    assert not any(torch.equal(a, b) for a, b in zip(trained, own, strict=True))


class Products(TorchDispatchMode):
    """The number of products in fp8, and of others, of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.in_fp8 = self.others = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.in_fp8 += function is torch.ops.aten._scaled_mm.default
        self.others += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_recomputing_changes_no_gradient(dtype: torch.dtype, tied: bool) -> None:
    """Four products of a block forward, eight backward; "cheap" does none of them again."""
    found, counts = {}, {}
    for recompute in ("none", "cheap", "all", "auto"):
        model = small_model(dtype, tied)
        compile_blocks(model, "no", recompute)
        with Products() as counter:
            found[recompute] = gradients(model, [draw_batch(3)])
        counts[recompute] = counter.in_fp8
        assert counter.others <= 3  # of the head
    for values in found.values():
        assert all(torch.equal(a, b) for a, b in zip(values, found["none"], strict=True))
    assert counts["none"] == counts["cheap"] == counts["auto"] == 2 * (4 + 8)
    assert counts["all"] > counts["none"]


@pytest.mark.parametrize("precision", ["dtype", "fp8"])
def test_a_compiled_run_in_fp8_keeps_its_activations(precision: str, monkeypatch: Patch) -> None:
    """With --recompute auto; a run in its own precision recomputes the cheap ones."""
    monkeypatch.setattr("llama_torch.training.compile.can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = small_model()
    with functorch.patch(activation_memory_budget=0.5):
        with nullcontext() if precision == "fp8" else without_float8(model):
            assert compile_blocks(model, "yes", "auto")
        assert (functorch.activation_memory_budget == 1) == (precision == "fp8")


def test_micro_batches_add_up() -> None:
    """To the bit in the blocks: half of a gradient, with half of the scale, has its products.

    The head's gradient, no product in fp8, is summed inside a product, in an order that is the
    processor's own.
    """
    model, parts = small_model(tied=False), [draw_batch(2, seed) for seed in (1, 2)]
    one, other = (gradients(model, [part]) for part in parts)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, found, a, b in zip(names, gradients(model, parts), one, other, strict=True):
        if name == "lm_head.weight":
            torch.testing.assert_close(found, (a + b) / 2, rtol=0, atol=1e-6 * a.abs().max().item())
        else:
            assert torch.equal(found, (a + b) / 2), name


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what torch warns of
def test_a_compiled_model_is_the_eager_one() -> None:
    """As --verify-every finds it, too, which has it compute in its own precision."""
    wanted = gradients(small_model(), [draw_batch(2)])
    model = small_model()
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.forward = torch.compile(  # type: ignore[method-assign]
            layer.forward, backend="aot_eager", fullgraph=True, dynamic=False
        )
    for _ in range(2):
        for found, want in zip(gradients(model, [draw_batch(2)]), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    assert all(measure.holds for measure in verify.check(model, [draw_batch(2)], 0.0))
