"""The torch package on a GPU, held to the oracle; skipped, and said so, where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llama_torch import step
from llama_torch.config import ModelConfig, OptimConfig
from llama_torch.generate import generate
from llama_torch.model import Llama
from llama_torch.optim import make_adamw
from reference_np.model import forward
from reference_np.tolerances import LOGIC, composed_bound, errors, logic_error

from .strategies import Case, cases, cast, wide_cases
from .support import torch_forward, torch_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@given(case=cases())
def test_every_activation_in_float64(case: Case) -> None:
    exact: dict = {}
    forward(
        case.params,
        case.tokens,
        case.config,
        positions=case.positions,
        mask=case.mask,
        trace=exact.__setitem__,
    )
    model = torch_model(case.config, case.params).cuda()
    _, _, actual = torch_forward(model, case.tokens, positions=case.positions, mask=case.mask)
    for name, value in exact.items():
        assert logic_error(actual[name], value) <= LOGIC, name


@given(case=cases())
def test_decoding_after_prefill_in_float64(case: Case) -> None:
    full, _ = forward(case.params, case.tokens, case.config)
    model = torch_model(case.config, case.params).cuda()
    cut = case.tokens.shape[1] // 2
    parts, cache = [], None
    for chunk in (case.tokens[:, :cut], case.tokens[:, cut:-1], case.tokens[:, -1:]):
        if chunk.shape[1]:
            logits, cache, _ = torch_forward(model, chunk, cache=cache)
            parts.append(logits)
    assert logic_error(np.concatenate(parts, 1)[:, -full.shape[1] :], full) <= LOGIC


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(case=wide_cases())
@settings(max_examples=25)
def test_low_precision_is_as_good_as_the_cpus(dtype: str, case: Case) -> None:
    """Against the float64 oracle; the baseline is torch's CPU kernels in the same dtype."""
    torch_dtype = getattr(torch, dtype)
    torch.set_float32_matmul_precision("highest")
    low = torch_model(case.config, case.params).to(torch_dtype)
    exact: dict = {}
    rounded = {name: p.double().numpy() for name, p in low.state_dict().items()}
    forward(rounded, case.tokens, case.config, positions=case.positions, trace=exact.__setitem__)
    _, _, plain = torch_forward(low, case.tokens, positions=case.positions)
    _, _, actual = torch_forward(low.cuda(), case.tokens, positions=case.positions)
    for name, value in exact.items():
        error, bound = (
            errors(actual[name], value),
            composed_bound(errors(plain[name], value), dtype),
        )
        assert error.within(bound), f"{name}: {error}, bound {bound}"


def test_a_training_step_equals_the_cpus() -> None:
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100)
    batch = step.Batch(torch.arange(24).view(2, 12), torch.arange(1, 25).view(2, 12))
    results = []
    torch.set_float32_matmul_precision("highest")
    for device in ("cpu", "cuda"):
        model = Llama(config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(device)
        loss, norm = step.train_step(
            model,
            make_adamw(model, OptimConfig()),
            [batch],
            lr=1e-3,
            grad_clip=1.0,
            precision=step.Precision(torch.device(device), torch.float32),
        )
        results.append([loss.cpu(), norm.cpu(), *(p.detach().cpu() for p in model.parameters())])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@given(case=wide_cases())
@settings(max_examples=5)
def test_greedy_decoding_equals_the_cpus(case: Case) -> None:
    model = torch_model(case.config, cast(case.params, np.float64))
    prompt = case.tokens[0].tolist()
    on_cpu = list(generate(model, prompt, 8))
    assert list(generate(model.cuda(), prompt, 8)) == on_cpu
