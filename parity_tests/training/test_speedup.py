"""Compiled, chunked and recomputed steps equal the plain one; --profile and --dry-run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llama_common.errors import InputError
from llama_torch import train
from llama_torch.model import loss
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.vocab_part import VocabPart
from llama_torch.training import step
from llama_torch.training.compile import compile_blocks
from llama_torch.training.throughput import flops_per_token
from reference_np.grad import Batch
from reference_np.ops import IGNORE

from ..backends.torch_backends import to_torch
from ..backends.torch_model import torch_model
from ..conformance.architectures import seeds
from ..conformance.strategies import Case, cast, wide_cases

CPU = ["--device", "cpu", "--dtype", "float32", "--n-layers", "1", "--dim", "16", "--n-heads", "2"]
CPU += ["--n-kv-heads", "1", "--max-seq-len", "16", "--steps", "6", "--sample-every", "0"]


class Counter(TorchDispatchMode):
    """A count of operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@given(case=wide_cases())
@settings(max_examples=15)
def test_recomputing_activations_changes_no_gradient(case: Case) -> None:
    batch = to_torch(Batch(case.tokens, np.roll(case.tokens, -1, axis=1), case.positions))
    found, counts = {}, {}
    for recompute in ("none", "cheap", "all"):
        model = torch_model(case.config, cast(case.params, np.float64)).requires_grad_(True)
        assert not compile_blocks(model, "no", recompute)
        with Counter() as counter:
            total, grads = step.accumulate(model, [batch])
        found[recompute] = [total, *(grads[p] for p in model.parameters())]
        counts[recompute] = counter.counts
    for recompute in ("cheap", "all"):
        for one, other in zip(found[recompute], found["none"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    # Seven products of a block; "cheap" does none again, and norms again.
    again = counts["all"]["mm"] - counts["none"]["mm"]
    assert again >= 6 * case.config.n_layers  # the last one's result is not needed
    assert counts["cheap"]["mm"] == counts["none"]["mm"]
    assert counts["cheap"]["silu"] == 2 * counts["none"]["silu"]


def test_compilation_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_torch.training.compile.can_compile", lambda device: False)
    model = Llama(ModelConfig(16, 1, 2, 1, vocab_size=9))
    with pytest.raises(InputError, match="--compile yes: torch.compile does not work here"):
        compile_blocks(model, "yes", "auto")


@given(
    seed=seeds,
    vocab_size=st.integers(1, 200),
    rows=st.integers(1, 40),
    padding=st.integers(0, 9),
    z_loss=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_logits_become_their_derivative(
    seed: int, vocab_size: int, rows: int, padding: int, z_loss: float, dtype: torch.dtype
) -> None:
    """By hand and in place, against autograd; large logits and ignored targets too."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((rows, vocab_size + padding)) * rng.choice([1, 30])
    logits = torch.from_numpy(drawn).to(dtype)
    targets = torch.from_numpy(rng.integers(0, vocab_size, rows))
    targets[torch.from_numpy(rng.random(rows) < 0.3)] = IGNORE
    exact = logits[:, :vocab_size].double().requires_grad_()
    log_z = exact.logsumexp(-1)
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
    expected = (expected + z_loss * (log_z.square() * (targets != IGNORE)).sum()) / 7
    expected.backward()
    part = VocabPart(torch.empty(vocab_size, 1))
    found = loss._logits_to_grad_(logits, targets, part, 1 / 7, z_loss)
    roundings = 40 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    assert found.item() == pytest.approx(expected.item(), rel=roundings, abs=100 * roundings)
    tolerance = 4 * torch.finfo(dtype).eps * (1 + 100 * z_loss) / 7 + 30 * roundings
    assert (logits[:, :vocab_size].double() - exact.grad).abs().max() <= tolerance
    assert not logits[:, vocab_size:].any()


def test_operations_of_a_token() -> None:
    """As torch counts them, attention's unmasked half included."""
    config = ModelConfig(64, 2, 4, 2, vocab_size=100, max_seq_len=32, tie_embeddings=False)
    model = Llama(config)
    tokens = torch.randint(100, (3, 32))
    with FlopCounterMode(display=False) as counter:
        model(tokens)[0].sum().backward()
    n_parameters = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert flops_per_token(config, n_parameters) * tokens.numel() == pytest.approx(
        counter.get_total_flops(),
        rel=0.1,  # attention's kernel computes its scores again
    )
    saved = flops_per_token(config, n_parameters) - flops_per_token(config, n_parameters, 0.25)
    assert saved == 6 * 0.75 * 100 * 64  # of the head's products


def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*CPU, "--dry-run", "--verify-every", "3"]) == 0
    printed = capsys.readouterr().out
    model = Llama(ModelConfig(16, 1, 2, 1, max_seq_len=16))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, float32 on cpu" in printed
    for part in ("tokens/s, MFU", "memory at most", "GB of disk", "time ", "verification "):
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.main([*CPU, "--profile", "--out", str(out)]) == 0
    assert f"trace of 3 steps in {out}/trace.json" in capsys.readouterr().out
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert len(steps) == 3
    assert any(event["name"] == "aten::mm" for event in events)
    assert json.loads((out / "run.json").read_text())["settings"]["profile"] is False


# Torch's compiler looks at every tensor's .grad, and hides that warning unless it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_run_on_a_gpu_is_the_eager_one(tmp_path: Path) -> None:
    """In bfloat16, as rounding differs: the same losses to a hundredth."""
    losses = []
    for compile_ in ("yes", "no"):
        flags = ["--steps", "20", "--sample-every", "0", "--compile", compile_]
        out = str(tmp_path / compile_)
        assert train.main([*flags, "--out", out]) == 0
        losses.append(last_loss(Path(out)))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] < math.log(50257) - 0.5


def last_loss(out: Path) -> float:
    from tools.plot import read_curve

    return read_curve(out, "val/loss")[1][-1]
