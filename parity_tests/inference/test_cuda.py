"""Generation and compare.py on a GPU; the model itself is test_conformance's. Skipped without."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llama_common.errors import InputError
from llama_parity import compare
from llama_torch.inference.config import Decoding, SamplingConfig
from llama_torch.inference.cuda_graph import GraphStep, GraphStore
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.inference.quantization import dequantize, quantize
from llama_torch.inference.speculative import speculative_batch
from llama_torch.model.config import ModelConfig
from llama_torch.training.bad_steps import BadSteps, largest_loss
from reference_np.config import LlamaConfig

from ..backends.torch_model import save_numpy, torch_model
from ..conformance.strategies import Case, cast, random_params, wide_cases

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0)
MODES: tuple[Decoding, ...] = ("graph", "kernels")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it has gaps
def test_bad_steps_are_recorded_without_waiting_for_the_gpu() -> None:
    device = torch.device("cuda")
    max_loss = largest_loss(ModelConfig().vocab_size, 0.0)
    bad_steps = BadSteps(max_loss, device, lambda step: f"the windows of {step}", [])
    norm = torch.ones((), device=device)
    losses = torch.tensor([10.0, math.nan, 40.0], dtype=torch.float64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert all(bad_steps.accept(step, loss, norm) for step, loss in enumerate(losses, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(InputError, match="step 2 is bad: its loss is nan.*the windows of 1"):
        bad_steps.raise_if_bad()


@given(case=wide_cases())
@settings(max_examples=5)
def test_greedy_decoding_equals_the_cpus(case: Case) -> None:
    model = torch_model(case.config, cast(case.params, np.float64))
    prompt = case.tokens[0].tolist()
    on_cpu = list(generate(model, prompt, GREEDY))
    assert list(generate(model.cuda(), prompt, GREEDY)) == on_cpu


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@given(case=wide_cases())
@settings(max_examples=5)
def test_a_batch_equals_the_cpus_single_runs(temperature: float, case: Case) -> None:
    """Rows of unequal length, greedy and drawn: the draws do not depend on the device."""
    model = torch_model(case.config, cast(case.params, np.float64))
    prompts = [case.tokens[0].tolist(), case.tokens[0, :3].tolist()]
    each = [SamplingConfig(8, temperature, repetition_penalty=1.2, seed=i) for i in range(2)]
    alone = [list(generate(model, *row)) for row in zip(prompts, each, strict=True)]
    batch, found = DecodeBatch(model.cuda(), prompts, each, prefill_chunk=5), ([], [])
    batch.prefill()
    for _ in range(8):
        for token in batch.sample():
            found[token.prompt].append(token.id)
        batch.decode_one_token()
    assert list(found) == alone


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("mode", ["graph", "kernels", "compiled"])
@given(case=wide_cases())
@settings(max_examples=3)
def test_every_mode_writes_the_same(mode: Decoding, int8: bool, case: Case) -> None:
    """A second request takes the captured step again, with another prompt and length."""
    model = torch_model(case.config, cast(case.params, np.float64)).cuda()
    model = quantize(model, "int8") if int8 else model
    text, graphs = case.tokens[0].tolist(), GraphStore(model)
    for prompt, n_new in ((text, 12), (text[:3], 40), (text[2:], 5)):
        one = SamplingConfig(n_new, temperature=0.9, seed=n_new)
        expected = list(generate(model, prompt, one, decoding="eager"))
        assert list(generate(model, prompt, one, decoding=mode, graphs=graphs)) == expected
    assert len(graphs.steps) == 1


@pytest.mark.parametrize("mode", ["graph", "kernels", "compiled"])
@given(case=wide_cases())
@settings(max_examples=3)
def test_rows_of_a_captured_batch_end_at_different_lengths(mode: Decoding, case: Case) -> None:
    model = torch_model(case.config, cast(case.params, np.float64)).cuda()
    prompts = [case.tokens[0].tolist(), case.tokens[0, :3].tolist(), [5, 4]]
    each = [SamplingConfig(n, temperature=0) for n in (3, 12, 7)]
    alone = [list(generate(model, *row)) for row in zip(prompts, each, strict=True)]
    found: tuple[list[int], ...] = ([], [], [])
    for token in generate_tokens(DecodeBatch(model, prompts, each, decoding=mode)):
        found[token.prompt].append(token.id)
    assert list(found) == alone


@given(case=wide_cases())
@settings(max_examples=5)
def test_int8_rows_on_tensor_cores(case: Case) -> None:
    """In bfloat16 the kernels err about as much as the model's own products, or less."""
    model = torch_model(case.config, cast(case.params, np.float64)).cuda().bfloat16()
    weights = {name: w.cpu().numpy() for name, w in dequantize(quantize(model, "int8")).items()}
    tokens = torch.from_numpy(np.stack([np.roll(case.tokens[0], i) for i in range(3)])).cuda()
    exact = torch_model(case.config, weights)(tokens.cpu())[0].cuda()
    errors = {}
    for mode in MODES:
        step = GraphStep(model, len(tokens), tokens.shape[1], mode)
        step.begin([0] * len(tokens))
        logits = [step.replay(column).double().clone() for column in tokens.split(1, dim=1)]
        errors[mode] = (torch.cat(logits, dim=1) - exact).norm() / exact.norm()
    assert 0 < errors["kernels"] <= 1.5 * errors["graph"]


@pytest.mark.parametrize("mode", ["auto", "eager"])
@given(case=wide_cases())
@settings(max_examples=3)
def test_draft_tokens_change_no_token(mode: Decoding, case: Case) -> None:
    params = cast(case.params, np.float64)
    model, draft = (torch_model(case.config, params).cuda() for _ in range(2))
    with torch.no_grad():
        draft.model.norm.weight.mul_(torch.linspace(0.5, 1.5, case.config.dim).cuda())
    prompt, settings = case.tokens[0, :3].tolist(), SamplingConfig(40, temperature=0)
    batch = speculative_batch(model, draft, prompt, settings, decoding=mode)
    found = [token.id for token in generate_tokens(batch)]
    assert found == list(generate(model, prompt, settings, decoding="eager"))


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    config = LlamaConfig(256, 2, 4, 2, 64, 512, 1000, max_seq_len=4096)
    path = tmp_path / "ckpt.safetensors"
    save_numpy(cast(random_params(config, 0), np.float32), path, {"config": config.to_json()})
    return path


@pytest.mark.parametrize("against", ["cuda", "cuda:float64", "cuda:bfloat16", "cuda:float16"])
def test_a_checkpoint_passes_on_the_gpu(ckpt: Path, against: str) -> None:
    assert compare.main([str(ckpt), "--against", against]) == 0


@contextmanager
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_hardwares_tf32_is_named(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What jax#18934 is about, done by tensor cores and not by the catalogue's rounding."""
    with tf32():
        assert compare.main([str(ckpt), "--against", "cuda", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first_divergence"]["name"] == "layers.0.q"
    assert [[b["name"] for b in e["mutants"]] for e in report["diagnosis"]] == [["matmul_tf32"]]
