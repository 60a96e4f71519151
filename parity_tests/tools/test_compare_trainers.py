"""compare.py --grads: trainers whose first step at the peak is right; and what a verdict adds."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_parity.comparison.judging import Measure, Row
from llama_parity.comparison.trace_format import Call
from llama_parity.comparison.verdict import Extent, verdict
from reference_np import optim
from reference_np.config import LlamaConfig
from reference_np.tolerances import Errors

from ..conformance.oracle import Oracle
from .comparing import write

SHORT = ("--grads", "--tokens", 16, "--steps", 0, "--no-diagnose")
Adam = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt.safetensors", LlamaConfig(16, 1, 4, 2, 4, 24, 60))


def nadam(p: Any, g: Any, m: Any, v: Any, step: int, lr: float, decay: float, hyper: Any) -> Adam:
    """AdamW with Nesterov's momentum, whose first step is AdamW's."""
    _, m, v = optim.adamw(p, g, m, v, step, lr, decay, hyper)
    ahead = (hyper.beta1 * m + (1 - hyper.beta1) * g) / (1 - hyper.beta1 ** (step + 1))
    root = np.sqrt(v / (1 - hyper.beta2**step))
    return p * (1 - lr * decay) - lr * ahead / (root + hyper.adam_eps), m, v


def amsgrad(p: Any, g: Any, m: Any, v: Any, step: int, lr: float, decay: float, hyper: Any) -> Adam:
    """AdamW whose second moment never falls."""
    _, m, new = optim.adamw(p, g, m, v, step, lr, decay, hyper)
    v = np.maximum(new, v)
    root = np.sqrt(v / (1 - hyper.beta2**step))
    return p * (1 - lr * decay) - lr * m / (1 - hyper.beta1**step) / (root + hyper.adam_eps), m, v


def peak_decay(
    p: Any, g: Any, m: Any, v: Any, step: int, lr: float, decay: float, hyper: Any
) -> Adam:
    """AdamW whose decay has the highest learning rate and not the step's."""
    new, m, v = optim.adamw(p, g, m, v, step, lr, 0.0, hyper)
    return new - hyper.lr * decay * p, m, v


class Trainer(Oracle):
    """The oracle with another AdamW, hyperparameters or results."""

    def __init__(
        self,
        adamw: Callable = optim.adamw,
        hyper: Callable = lambda hyper: hyper,
        edit: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda found: found,
    ) -> None:
        super().__init__()
        self.rules = SimpleNamespace(**{**vars(optim.REFERENCE_RULES), "adamw": adamw})
        self.hyper, self.edit = hyper, edit

    def train(
        self, config: Any, params: Any, batches: Any, hyper: Any, steps: int
    ) -> Mapping[str, Any]:
        params = dict(params)
        state, losses, norms = optim.init_state(params), [], []
        for _ in range(steps):
            params, state, metrics = optim.train_step(
                params, state, batches, config, self.hyper(hyper), rules=self.rules
            )
            losses.append(metrics.loss)
            norms.append(metrics.grad_norm)
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return self.edit({"loss": losses, "grad_norm": norms, "params": params, **moments})


def longer_warmup(hyper: Any) -> Any:
    return dataclasses.replace(hyper, warmup_steps=2 * hyper.warmup_steps)


def without_decay(hyper: Any) -> Any:
    return dataclasses.replace(hyper, final_lr_ratio=1.0)


WRONG = {
    "nadam": (Trainer(nadam), "step 1 update"),
    "amsgrad": (Trainer(amsgrad), "step 1"),
    "decay at the peak's rate": (Trainer(peak_decay), "step 0 update"),
    "a longer warmup": (Trainer(hyper=longer_warmup), "step 0 update"),
    "no decay of the rate": (Trainer(hyper=without_decay), "step 3 update"),
    "beta2": (Trainer(hyper=lambda h: dataclasses.replace(h, beta2=0.999)), "clipped exp_avg_sq"),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bug", WRONG)
def test_a_bug_that_shows_after_the_first_step_fails(
    ckpt: Path, report: Callable, offer: Callable, bug: str, dtype: str
) -> None:
    trainer, first = WRONG[bug]
    found = report(ckpt, *SHORT, "--dtype", dtype, "--against", offer(trainer))
    assert not found["verdict"]["holds"]
    assert f"first divergence at {first} " in found["verdict"]["line"]


def times(factor: float) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Return an edit that multiplies the second moments."""
    return lambda found: (
        found | {"exp_avg_sq": {name: factor * v for name, v in found["exp_avg_sq"].items()}}
    )


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (times(50.0), "rms error"),
        (times(np.nan), "not finite"),
        (lambda found: found | {"exp_avg_sq": {}}, "missing"),
        (lambda found: {kind: x for kind, x in found.items() if kind != "exp_avg_sq"}, "missing"),
    ],
    ids=["times 50", "NaN", "empty", "absent"],
)
def test_wrong_second_moments_fail(
    ckpt: Path, report: Callable, offer: Callable, edit: Callable, why: str
) -> None:
    line = report(ckpt, *SHORT, "--against", offer(Trainer(edit=edit)))["verdict"]["line"]
    assert "first divergence at clipped exp_avg_sq " in line
    assert why in line


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_right_trainer_passes(ckpt: Path, report: Callable, offer: Callable, dtype: str) -> None:
    verdict = report(ckpt, *SHORT, "--dtype", dtype, "--against", offer(Trainer()))["verdict"]
    assert verdict["holds"], verdict["line"]
    assert verdict["unseen"] == []


def test_a_backend_that_takes_one_step_alone_says_what_is_not_seen(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    class OneStep(Trainer):
        def train(
            self, config: Any, params: Any, batches: Any, hyper: Any, steps: int
        ) -> Mapping[str, Any]:
            if steps > 1:
                raise NotImplementedError("one step alone")
            return super().train(config, params, batches, hyper, steps)

    found = report(ckpt, *SHORT, "--against", offer(OneStep()))
    assert found["verdict"]["holds"], found["verdict"]["line"]
    assert "; not seen: beta2 and the schedule (first step alone)" in found["verdict"]["line"]


def test_a_passing_verdict_lists_the_methods_that_nothing_called(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    class Untrue(Oracle):
        def logits(self, *arguments: Any) -> Any:
            return np.full_like(super().logits(*arguments), np.nan)

    short = SHORT[1:]
    verdict = report(ckpt, *short, "--against", offer(Untrue()))["verdict"]
    assert verdict["holds"], verdict["line"]
    assert "logits" in verdict["uncalled"]
    assert f"; not called: {', '.join(verdict['uncalled'])}" in verdict["line"]
    assert verdict["uncalled"][-2:] == ["loss_and_grads", "train"]
    trained = report(ckpt, *SHORT, "--against", offer(Untrue()))["verdict"]["uncalled"]
    assert trained == verdict["uncalled"][:-2]


def test_a_rotation_that_declared_angles_allow_is_named_where_errors_add_up() -> None:
    measure = Measure(Errors(1, 1, 1), Errors(2, 2, 2))
    rows = [
        Row(0, f"layers.0.{name}", status, measure, measure)
        for name, status in (("q_rope", "documented"), ("k_rope", "ok"), ("attn", "inherits"))
    ]
    calls = [Call("prompt", np.zeros((1, 1), np.int64))]
    line = verdict(rows, 3, calls, Extent("activations"))["line"]
    assert line.endswith(
        "at layers.0.attn (prompt) (q_rope is within the bound of declared float32 angles alone)"
    )
    other = verdict(
        [row._replace(status="ok") for row in rows[:2]] + rows[2:], 3, calls, Extent("")
    )
    assert other["line"].endswith("at layers.0.attn (prompt)")
