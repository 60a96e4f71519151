"""--verify-every stops a run in which an operation computes wrong values or gradients."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from llama_torch import train
from llama_torch.checkpoint.step_folders import newest
from llama_torch.checkpoint.training_state import load_state
from llama_torch.model import embedding, llama, loss, rope
from llama_torch.model.config import ModelConfig
from llama_torch.training import loop, objective, step

from ..planted.training import gradient_of
from ..support.trainer_runs import scalars, unsampled_run

pytestmark = pytest.mark.numeric

FLOAT32, BFLOAT16 = ["--dtype", "float32"], ["--dtype", "bfloat16"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return unsampled_run(tmp_path)


# Faults of a live model: each replaces one operation, as a broken kernel or an edit would.
Patch = pytest.MonkeyPatch


def other_base(patch: Patch) -> None:
    real = rope.rope_frequencies

    def frequencies(config: ModelConfig, device: Any = None) -> Tensor:
        return real(dataclasses.replace(config, rope_theta=2 * config.rope_theta), device)

    patch.setattr(rope, "rope_frequencies", frequencies)


def no_epsilon(patch: Patch) -> None:
    real = F.rms_norm
    patch.setattr(F, "rms_norm", lambda x, shape, weight, eps: real(x, shape, weight, 0.0))


def sees_the_future(patch: Patch) -> None:
    real = F.scaled_dot_product_attention

    def attention(*given: Any, is_causal: bool, enable_gqa: bool) -> Tensor:
        return real(*given, is_causal=False, enable_gqa=enable_gqa)

    patch.setattr(F, "scaled_dot_product_attention", attention)


def one_row_for_all(patch: Patch) -> None:
    real = rope.apply_rope
    patch.setattr(llama, "apply_rope", lambda x, tables: real(x[:1], tables).expand(x.shape))


def silu_gradient(patch: Patch) -> None:
    real = F.silu
    patch.setattr(F, "silu", lambda x: gradient_of(x * x.detach().sigmoid(), real(x)))


def attention_gradient(patch: Patch) -> None:
    """Drop the gradient of the keys."""
    real = F.scaled_dot_product_attention
    patch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, *rest, **more: real(q, k.detach(), *rest, **more),
    )


def ignored_learnt(patch: Patch) -> None:
    """Learn token 0 where there is no target, in place of leaving the position out."""
    everything = lambda x, t: (x.flatten(0, 1), t.flatten().clamp(min=0), None)  # noqa: E731
    patch.setattr(loss, "_learnt", everything)


def mean_of_means(patch: Patch) -> None:
    real = loss.backward_loss

    def backward(hidden: Tensor, head: Tensor, targets: Tensor, n: int, z: float) -> Tensor:
        return real(hidden, head, targets, 2 * loss.count_valid(targets), z)

    patch.setattr(objective, "backward_loss", backward)


def last_gradient_alone(patch: Patch) -> None:
    """Use the last micro-batch alone."""
    real = step.accumulate
    patch.setattr(
        step, "accumulate", lambda model, batches, *rest: real(model, batches[-1:], *rest)
    )


def embedding_forgotten(patch: Patch) -> None:
    real = embedding.embed
    patch.setattr(embedding, "embed", lambda ids, weight: real(ids, weight.detach()) + 0)


@pytest.mark.parametrize(
    ("fault", "more", "says"),
    [
        (other_base, FLOAT32, "(logits: error"),
        (no_epsilon, FLOAT32, "(logits: error"),
        (sees_the_future, FLOAT32, "(logits: error"),
        (sees_the_future, BFLOAT16, "(logits: error"),
        (one_row_for_all, FLOAT32, "(logits: error"),
        (one_row_for_all, BFLOAT16, "gradients, worst of"),
        (silu_gradient, FLOAT32, "gradients, worst of model.layers.0.mlp.gate_proj.weight: error"),
        (attention_gradient, FLOAT32, "self_attn.k_proj.weight: error inf"),
        (attention_gradient, BFLOAT16, "self_attn.k_proj.weight: error inf"),
        (ignored_learnt, [*FLOAT32, "--max-seq-len", "70"], "(loss: error"),
        (mean_of_means, [*FLOAT32, "--grad-accum", "2"], "(loss: error"),
        (last_gradient_alone, [*BFLOAT16, "--grad-accum", "2"], "gradients, worst of"),
        (embedding_forgotten, FLOAT32, "model.embed_tokens.weight: error"),
        (embedding_forgotten, [*BFLOAT16, "--no-tie-embeddings"], "model.embed_tokens.weight"),
    ],
)
def test_a_fault_in_the_midst_of_a_run_stops_it(
    fault: Callable[[Patch], None],
    more: list[str],
    says: str,
    tmp_path: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A fault from step 3 on: the check after step 2 passes, the one after step 4 fails."""
    out, real, taken = tmp_path / "run", step.train_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(None)
        if len(taken) == 3:
            fault(monkeypatch)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    every = ["--verify-every", "2", "--save-every", "2", "--lr", "1e-2"]
    assert train.main([*flags, *every, *more, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "step     2  verified" in captured.out
    assert captured.err.startswith("error: step 4: the model does not compute what the oracle does")
    assert captured.err.count("\n") == 1
    assert says in captured.err, captured.err
    assert f"python tools/compare.py {out}/model.safetensors" in captured.err
    seen = scalars(out)
    names = [n for n in ("logits", "loss", "gradients") if n in captured.err]
    for name in names[:1]:
        error, bound = (dict(seen[f"verify/{name}_{kind}"])[4] for kind in ("error", "bound"))
        assert error > bound
    assert [at for at, _ in seen["train/loss"]][-1] == 4
    assert load_state(newest(out))[1] == 2
