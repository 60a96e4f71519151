"""Generation and compare.py on a GPU; the model itself is test_conformance's. Skipped without."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.numpy import save_file

from llama_torch.batch import Batch, generate
from llama_torch.generation_config import SamplingConfig
from reference_np.config import LlamaConfig
from tools import compare

from .strategies import Case, cast, random_params, wide_cases
from .support import torch_model

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


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
    batch, found = Batch(model.cuda(), prompts, each, prefill_chunk=5), ([], [])
    for _ in range(8):
        for token in batch.choose():
            found[token.row].append(token.id)
        batch.advance()
    assert list(found) == alone


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    config = LlamaConfig(256, 2, 4, 2, 64, 512, 1000, max_seq_len=4096)
    path = tmp_path / "ckpt.safetensors"
    save_file(cast(random_params(config, 0), np.float32), path, {"config": config.to_json()})
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
