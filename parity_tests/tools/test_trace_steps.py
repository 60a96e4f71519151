"""Trace files of version 2: targets and training steps, written, read and refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from llama_parity.comparison.trace_file import TraceFile, TraceWriter, write_trace
from llama_parity.comparison.trace_format import Call, Step
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import parameter_shapes
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters

from ..backends.torch_model import save_numpy
from .comparing import CONFIG, contents

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TARGETS = np.array([[1, 4, 1, 5, IGNORE], [2, 6, IGNORE, 3, IGNORE]])
POSITIONS, MASK = np.arange(5)[None] + 2, np.tril(np.ones((1, 5, 5), bool))
STEPS = [
    Step([Batch(TOKENS, TARGETS), Batch(TOKENS[:1], TARGETS[:1], POSITIONS, MASK)]),
    Step([Batch(TOKENS, TARGETS)]),
]
HYPER = Hyperparameters(lr=1e-3, grad_clip=0.5, warmup_steps=0)
GAIN = "model.norm.weight"
TIED = LlamaConfig(32, 2, 4, 2, 8, 48, 300, max_seq_len=2048, tie_embeddings=True)


def rng_values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def results(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Return made-up results of a step, by their names."""
    shapes = {"loss": (), "grad_norm": ()}
    for kind in ("grad", "param", "exp_avg", "exp_avg_sq"):
        shapes |= {f"{kind}.{name}": shape for name, shape in parameter_shapes(config).items()}
    return {name: rng_values(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def write(path: Path, config: LlamaConfig = CONFIG) -> Path:
    calls = [Call("prompt", TOKENS, targets=TARGETS), Call("other", TOKENS)]

    def fill(writer: TraceWriter) -> None:
        for c in range(2):
            writer.add(c, "target_logprobs", rng_values(TOKENS.shape, c))
        for s in range(2):
            for name, value in results(config).items():
                writer.add_step(s, name, value)

    write_trace(path, config, calls, "float64", fill, steps=STEPS, hyperparameters=HYPER)
    return path


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = TraceFile(write(tmp_path / "trace.safetensors"))
    assert trace.unknown == []
    assert trace.hyperparameters == HYPER
    assert np.array_equal(trace.calls[0].targets, TARGETS)
    assert trace.calls[1].targets is None
    for c in range(2):
        assert np.array_equal(trace.read(c, "target_logprobs"), rng_values(TOKENS.shape, c))
    assert (trace.has(0, "target_logprobs"), trace.has(0, "logits")) == (True, False)
    assert [len(step.batches) for step in trace.steps] == [2, 1]
    for step, given in zip(trace.steps, STEPS, strict=True):
        for found, batch in zip(step.batches, given.batches, strict=True):
            for a, b in zip(found, batch, strict=True):
                assert (a is None and b is None) or np.array_equal(a, b)
    for s in range(2):
        for name, value in results(CONFIG).items():
            found = trace.read_step(s, name)
            assert trace.has_step(s, name)
            assert found is not None
            assert (found.shape, found.tobytes()) == (value.shape, value.tobytes())
    assert trace.read_step(2, "loss") is None


def test_the_same_trace_is_the_same_bytes(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert a == b


def test_a_trace_of_steps_alone_needs_no_calls(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    write_trace(path, CONFIG, [], "float32", lambda _: None, steps=STEPS)
    trace = TraceFile(path)
    assert (trace.calls, len(trace.steps), trace.hyperparameters) == ([], 2, None)


def test_version_1_knows_no_targets_and_no_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    save_numpy(tensors, path, metadata | {"version": "1"})
    trace = TraceFile(path)
    assert (trace.steps, trace.hyperparameters, trace.calls[0].targets) == ([], None, None)
    assert trace.unknown == sorted(n for n in tensors if not n.endswith("tokens") or "step" in n)


def test_one_number_may_have_an_axis(tmp_path: Path) -> None:
    """Some writers of safetensors have no tensors without axes."""
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    save_numpy(tensors | {"step.0.loss": np.ones(1)}, path, metadata)
    loss = TraceFile(path).read_step(0, "loss")
    assert loss is not None
    assert (loss.shape, float(loss)) == ((), 1.0)


def test_other_names_of_a_step_are_ignored_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    extra = ["step.0.lr", "step.0.batch.0.labels", "step.01.loss", "step.0.", "call.0.loss"]
    save_numpy(tensors | dict.fromkeys(extra, np.zeros(1)), path, metadata)
    assert TraceFile(path).unknown == sorted(extra)


def read_all(path: Path) -> None:
    trace = TraceFile(path)
    trace.read_step(0, "loss")
    trace.read(0, "target_logprobs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"call.0.targets": TARGETS[:, 1:]}, "call.0.targets must be [2, 5] as its tokens are"),
        ({"call.0.targets": TARGETS[0]}, "call.0.targets must be [2, 5] as its tokens are"),
        ({"call.0.targets": TARGETS + 298}, "holds 302, outside the vocabulary of 300"),
        ({"call.0.targets": TARGETS - 2}, "holds -1, outside the vocabulary of 300 (-100 stands"),
        ({"call.0.targets": TARGETS * 1.0}, "call.0.targets is stored as F64, not as I64, I32"),
        ({"call.0.target_logprobs": TARGETS}, "call.0.target_logprobs is stored as I64, not as"),
        ({"step.1.batch.0.targets": TARGETS[:1]}, "step.1.batch.0.targets must be [2, 5]"),
        ({"step.1.batch.0.targets": TARGETS * 0 + 300}, "holds 300, outside the vocabulary"),
        ({"step.1.batch.0.targets": None}, "step.1.batch.0.targets is missing"),
        ({"step.1.batch.0.targets": TARGETS * 0 - 100}, "step 1 has no target but -100"),
        ({"step.1.batch.0.tokens": TOKENS - 2}, "step 1, micro-batch 0: token id -1 is outside"),
        ({"step.1.batch.0.tokens": None}, "step.1.batch.0.tokens is missing"),
        ({"step.0.batch.0.tokens": None}, "step.0.batch.0.tokens is missing"),
        ({"step.0.batch.1.positions": POSITIONS - 3}, "step.0.batch.1.positions holds -1, not 0"),
        ({"step.0.batch.1.mask": MASK * np.uint8(2)}, "step.0.batch.1.mask holds 2, not 0 and 1"),
        ({"step.0.batch.1.mask": MASK[:, 1:]}, "step 0, micro-batch 1: mask must be bool"),
        ({"step.2.loss": np.ones(())}, "step.2.batch.0.tokens is missing: step 2 has no micro-"),
        ({"step.4.loss": np.ones(())}, "step.2.batch.0.tokens is missing: step 2 has no micro-"),
        ({"step.0.batch.3.tokens": TOKENS}, "step.0.batch.2.tokens is missing"),
        ({"step.0.loss": np.ones(2)}, "step.0.loss must be [], got [2]"),
        ({"step.0.loss": TARGETS[0, 0]}, "step.0.loss is stored as I64, not as F64"),
        ({f"step.0.grad.{GAIN}": np.ones(31)}, f"step.0.grad.{GAIN} must be [32], got [31]"),
        ({f"step.1.exp_avg.{GAIN}": np.ones((1, 32))}, "must be [32], got [1, 32]"),
        ({"step.0.grad.norm": np.ones(1)}, "step.0.grad.norm: the model has no such parameter"),
        ({"step.0.param.": np.ones(1)}, "step.0.param.: the model has no such parameter (the"),
        (
            {"step.0.grad.model.layers.2.self_attn.q_proj.weight": np.ones((32, 32))},
            "model.layers.2.self_attn.q_proj.weight: the model has no such parameter",
        ),
    ],
)
def test_a_fault_of_the_tensors_is_one_line(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    edited = {name: x for name, x in (tensors | change).items() if x is not None}
    save_numpy(edited, path, metadata)
    with pytest.raises(InputError) as error:
        read_all(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "write the trace again" in str(error.value)


def test_a_tied_head_has_no_gradient_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors", TIED)
    metadata, tensors = contents(path)
    save_numpy(tensors | {"step.0.grad.lm_head.weight": np.ones((300, 32))}, path, metadata)
    with pytest.raises(InputError, match="it is tied, and model.embed_tokens.weight has the sum"):
        TraceFile(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    save_numpy(tensors, path, metadata | {"format": "trace"})
    with pytest.raises(InputError, match="its metadata says format trace, not llama-trace"):
        TraceFile(path)


def without(*names: str) -> str:
    return json.dumps({k: v for k, v in asdict(HYPER).items() if k not in names})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is a result of the optimizer, and the metadata has no hyperparameters to"),
        ("[]", "(hyperparameters): is not a JSON object"),
        (without("lr", "beta2"), "its hyperparameters lack lr, beta2"),
        (without()[:-1] + ', "momentum": 1}', "an unknown momentum; known: lr, beta1"),
        (without("lr")[:-1] + ', "lr": NaN}', "its hyperparameter lr is nan, not a finite number"),
        (without("lr")[:-1] + ', "lr": "1"}', "its hyperparameter lr is '1', not a finite number"),
        (without("lr")[:-1] + ', "lr": true}', "its hyperparameter lr is True, not a finite"),
        (without("beta2")[:-1] + ', "beta2": 1}', "beta2 is 1, and must be at least 0 and below 1"),
        (
            without("lr")[:-1] + ', "lr": -1e-3}',
            "its hyperparameter lr is -0.001, and must be zero",
        ),
        (without("adam_eps")[:-1] + ', "adam_eps": 0}', "adam_eps is 0, and must be positive and"),
        (without("steps")[:-1] + ', "steps": 1.5}', "steps is 1.5, not an integer from 0 on"),
        (without("steps")[:-1] + ', "steps": -1}', "steps is -1, not an integer from 0 on"),
        (without("steps")[:-1] + ', "steps": 1' + "0" * 400 + "}", "not an integer from 0 on"),
    ],
)
def test_a_fault_of_the_hyperparameters_is_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    del metadata["hyperparameters"]
    save_numpy(tensors, path, metadata if text is None else metadata | {"hyperparameters": text})
    with pytest.raises(InputError) as error:
        TraceFile(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


def test_gradients_need_no_hyperparameters(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    del metadata["hyperparameters"]
    kept = {n: x for n, x in tensors.items() if ".param." not in n and ".exp_avg" not in n}
    save_numpy(kept, path, metadata)
    trace = TraceFile(path)
    assert trace.hyperparameters is None
    assert trace.read_step(1, f"grad.{GAIN}") is not None


def test_compare_refuses_a_wrong_gradient_name(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    path = write(tmp_path / "trace.safetensors")
    metadata, tensors = contents(path)
    save_numpy(tensors | {"step.0.grad.x": np.ones(1)}, path, metadata)
    code, out, err = run(ckpt, "--against", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "step.0.grad.x: the model has no such parameter" in err
