"""Training in bfloat16: gradients beside transformers', exact float32 master weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_torch import export, train
from llama_torch.checkpoint.file_names import MODEL_FILE, STATE_FILE
from llama_torch.checkpoint.hf import read_metadata
from llama_torch.checkpoint.step_folders import FOLDER, newest
from llama_torch.model.llama import Llama
from llama_torch.training import optimizer as optimizer_module
from llama_torch.training import setup, step
from llama_torch.training.optimizer import MasterAdamW, join, learning_rate, split
from reference_np import optim
from reference_np.config import LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.low_precision import with_rounded_moments
from reference_np.optim import Hyperparameters
from reference_np.tolerances import BASELINE_FACTOR, FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..backends.torch_backends import optim_config, to_torch
from ..backends.torch_model import torch_model
from ..conformance.architectures import seeds
from ..conformance.strategies import Case, Params, wide_cases
from ..support.devices import on_every_device
from ..support.trainer_runs import SMALL_RUN, TEXT, refused

pytestmark = pytest.mark.numeric

TINY = LlamaConfig(4, 1, 1, 1, 4, 4, 4)


def peer(case: Case, params: Params, dtype: torch.dtype) -> Any:
    # Late: it imports transformers, for seconds.
    from llama_parity.comparison.transformers_model import config_from, empty_model

    model = empty_model(config_from(case.config.to_hf(), case.config.n_layers), dtype)
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in params.items()}
    if case.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()  # assigning made two parameters of a tied one
    # Rounding a model to bfloat16 would round these too, and excuse what rounds them.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model.requires_grad_(True)


def peer_arguments(case: Case) -> dict[str, torch.Tensor]:
    extra = {"attention_mask": torch.ones(case.tokens.shape, dtype=torch.long)}
    if case.positions is not None:
        extra["position_ids"] = torch.from_numpy(case.positions)
    return extra


@on_every_device
@given(case=wide_cases(for_transformers=True))
@settings(max_examples=-(-settings.default.max_examples // 5))
def test_gradients_in_bfloat16(device: str, case: Case) -> None:
    """The trainer's default where the hardware has it; rms over all gradients together."""
    params = {n: v.astype(ml_dtypes.bfloat16).astype(np.float64) for n, v in case.params.items()}
    targets = np.roll(case.tokens, -1, axis=1)
    batch = Batch(case.tokens, targets, case.positions)
    _, exact = loss_and_grads(params, batch, case.config)

    single = {n: v.astype(np.float32) for n, v in params.items()}
    model = torch_model(case.config, single).to(device, torch.bfloat16).requires_grad_(True)
    _, grads = step.accumulate(model, [to_torch(batch)])

    theirs = peer(case, params, torch.bfloat16)
    logits = theirs(torch.from_numpy(case.tokens), **peer_arguments(case)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()

    def error(found: Mapping[str, torch.Tensor | None]) -> float:
        named = {
            name: grad.double().cpu().numpy() for name, grad in found.items() if grad is not None
        }
        wrong = sum(np.sum((named[name] - value) ** 2) for name, value in exact.items())
        return float(np.sqrt(wrong / sum(np.sum(value**2) for value in exact.values())))

    floor = FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"]
    mine = error({name: grads[p] for name, p in model.named_parameters()})
    plain = error({name: p.grad for name, p in theirs.named_parameters()})
    assert 0 < mine <= BASELINE_FACTOR * plain + floor, f"{mine}, plain {plain}"
    assert mine < 0.1  # and small in itself: a lost term would be of the gradient's own size


@on_every_device
@given(case=wide_cases())
@settings(max_examples=-(-settings.default.max_examples // 5))
def test_micro_batches_in_bfloat16_lose_nothing_to_their_sum(device: str, case: Case) -> None:
    """Gradients of many micro-batches are summed in float32: 64 alike are as one.

    Half a rounding leaves room for kernels that are not the same twice; a sum in bfloat16 errs by
    two on average.
    """
    single = {n: v.astype(np.float32) for n, v in case.params.items()}
    model = torch_model(case.config, single).to(device, torch.bfloat16).requires_grad_(True)
    batch = to_torch(Batch(case.tokens, np.roll(case.tokens, -1, axis=1), case.positions))
    _, one = step.accumulate(model, [batch])
    one = {p: grad.clone() for p, grad in one.items()}
    model.zero_grad()
    _, many = step.accumulate(model, [batch] * 64)
    wrong = sum((many[p] - one[p].float()).square().sum() for p in one)
    size = sum(one[p].float().square().sum() for p in one)
    # Each part is rounded as the whole is: to divide by 64 times as many targets is exact.
    assert many[next(iter(many))].dtype == torch.float32
    assert (wrong / size).sqrt() < UNIT_ROUNDOFF["bfloat16"] / 2


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(values=st.lists(finite, min_size=1, max_size=20))
def test_a_weight_and_its_lower_half_are_the_float32(values: list[float]) -> None:
    master = torch.tensor(values)
    weight, low = split(master)
    assert torch.equal(join(weight, low).view(torch.int32), master.view(torch.int32))
    nearest = master.to(torch.bfloat16)
    far = (weight.double() - master.double()).abs()
    assert (far <= (nearest.double() - master.double()).abs()).logical_or(nearest.isinf()).all()


@on_every_device
@given(
    seed=seeds,
    decay=st.sampled_from([0.0, 0.3]),
    clip=st.sampled_from([0.1, 100.0]),
    block=st.sampled_from([7, 8, 35, 1 << 16]),
)
def test_ten_steps_on_bfloat16_weights_are_the_oracles_in_float32(
    device: str, seed: int, decay: float, clip: float, block: int
) -> None:
    """The same gradients to both; the weights' low halves and the moments included.

    A tensor's step is taken in blocks: of one size, with a smaller last one, or in one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_module, "BLOCK", block)
        take_ten_steps(device, seed, decay, clip)


def take_ten_steps(device: str, seed: int, decay: float, clip: float) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (5, 7), "norm.weight": (7,)}
    params = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    hyper = Hyperparameters(lr=1e-2, weight_decay=decay, grad_clip=clip, warmup_steps=3, steps=12)
    tensors = {n: torch.tensor(v, device=device) for n, v in params.items()}
    given_params = {n: torch.nn.Parameter(tensor) for n, tensor in tensors.items()}
    matrix, norm = given_params.values()
    groups = [{"params": [matrix], "weight_decay": decay}, {"params": [norm]}]
    optimizer = MasterAdamW(groups, lr=1.0, betas=(hyper.beta1, hyper.beta2), eps=hyper.adam_eps)
    exact, state = {n: v.astype(np.float64) for n, v in params.items()}, None
    for i in range(10):
        grads = {n: torch.from_numpy(rng.standard_normal(s)).bfloat16() for n, s in shapes.items()}
        by_parameter = {given_params[n]: grad.to(device) for n, grad in grads.items()}
        lr = learning_rate(i, hyper.steps, optim_config(hyper))
        norm_found = step.clip_and_step(None, optimizer, by_parameter, lr=lr, grad_clip=clip)
        state = state or optim.init_state(exact)
        made = 0.0, {n: grad.double().numpy() for n, grad in grads.items()}
        rules = SimpleNamespace(**vars(optim.REFERENCE_RULES))
        rules.accumulate = lambda *_, made=made: made
        exact, state, metrics = optim.train_step(exact, state, [], TINY, hyper, rules=rules)
        assert norm_found.item() == pytest.approx(metrics.grad_norm, rel=1e-6)
    for name, parameter in given_params.items():
        assert parameter.dtype == torch.bfloat16
        master = optimizer.master(parameter).cpu()
        np.testing.assert_allclose(master, exact[name], rtol=1e-5, atol=1e-6)
        for kind in ("exp_avg", "exp_avg_sq"):
            found = optimizer.state[parameter][kind].cpu()
            np.testing.assert_allclose(found, getattr(state, kind)[name], rtol=1e-5, atol=1e-7)


@on_every_device
@given(seed=seeds, decay=st.sampled_from([0.0, 0.3]), magnitude=st.integers(-20, 5))
def test_moments_in_bfloat16_are_the_oracles_rounded(
    device: str, seed: int, decay: float, magnitude: int
) -> None:
    """Of each of five steps, from the state that the one before left."""
    rng = np.random.default_rng(seed)
    parameter = torch.nn.Parameter(torch.randn(5, 7, device=device))
    hyper = Hyperparameters(lr=1e-2)
    group = {"params": [parameter], "weight_decay": decay}
    betas = hyper.beta1, hyper.beta2
    given_optimizer = MasterAdamW(
        [group], lr=hyper.lr, betas=betas, eps=hyper.adam_eps, moments=torch.bfloat16
    )
    state = given_optimizer.state[parameter]
    rule = with_rounded_moments(optim.adamw)

    def moments() -> list[Any]:
        return [state[kind].cpu().double().numpy() for kind in ("exp_avg", "exp_avg_sq")]

    for t in range(1, 6):
        grad = torch.from_numpy(rng.standard_normal((5, 7)) * 2.0**magnitude).bfloat16()
        before = given_optimizer.master(parameter).cpu().double().numpy(), *moments()
        scale = torch.ones((), device=device)
        given_optimizer.update({parameter: grad.to(device)}, scale)
        p, m, v = before
        step_of = grad.double().numpy(), m, v, t, hyper.lr, decay, hyper
        wanted, *rounded = rule(p, *step_of)
        found = given_optimizer.master(parameter).cpu()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        for moment, unrounded, oracles in zip(
            moments(), optim.adamw(p, *step_of)[1:], rounded, strict=True
        ):
            # A float32 sum that ends beside the middle of two bfloat16 may go to either.
            bound = UNIT_ROUNDOFF["bfloat16"] * np.abs(unrounded) + 1e-6 * np.abs(unrounded).max()
            for each in (moment, oracles):
                assert (np.abs(each - unrounded) <= bound).all()
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_run_with_moments_in_bfloat16_resumes_exactly(tmp_path: Path, stopped_at: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = [*SMALL_RUN, "--sample-every", "0", "--data", str(text), "--dtype", "bfloat16"]
    flags += ["--moments", "bfloat16", "--keep-last", "9", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*flags, str(whole)]) == 0
    assert train.main([*flags, str(parts)]) == 0
    for step_folder in (parts / FOLDER).iterdir():  # as if it had been killed
        if int(step_folder.name) > stopped_at:
            shutil.rmtree(step_folder)
    assert train.main(["--resume", "--out", str(parts)]) == 0
    one, other = (load_file(newest(folder) / STATE_FILE) for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, other[name]), name
        if name.startswith("exp_avg"):
            assert torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dtype float32", "--moments bfloat16 needs --dtype bfloat16, got float32"),
        ("--dtype bfloat16 --fsdp 0", "--moments bfloat16 goes with neither --fsdp nor --tp"),
    ],
)
def test_where_moments_have_no_bfloat16_it_is_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL_RUN, "--moments", "bfloat16", *flags.split(), "--out", str(tmp_path / "run")]
    assert message in refused(argv, capsys)


def test_a_bfloat16_run_exports_its_float32_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.safetensors, best/, the checkpoint and its export are equal to the bit."""
    made: list[tuple[Llama, MasterAdamW]] = []
    build = setup.build

    def kept(*given: Any) -> Any:
        made.append(build(*given))
        return made[-1]

    monkeypatch.setattr(setup, "build", kept)
    text, out, gathered = tmp_path / "text.txt", tmp_path / "run", tmp_path / "gathered"
    text.write_text(TEXT)
    flags = [*SMALL_RUN, "--dtype", "bfloat16", "--lr", "1e-2", "--sample-every", "0"]
    assert train.main([*flags, "--data", str(text), "--out", str(out)]) == 0
    assert export.main([str(out), "--to", str(gathered)]) == 0
    ((model, optimizer),) = made
    masters = {name: optimizer.master(p) for name, p in model.named_parameters()}
    state = load_file(newest(out) / STATE_FILE)
    found = {folder: load_file(folder / MODEL_FILE) for folder in (out, out / "best", gathered)}
    assert read_metadata(out / "best" / MODEL_FILE)["step"] == "6"  # the last is the best
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert not torch.equal(master, master.bfloat16().float()), name  # more than the model's
        assert torch.equal(state[f"parameter.{name}"], master)
        for folder, tensors in found.items():
            assert tensors[name].dtype == torch.float32
            assert torch.equal(tensors[name], master), f"{folder.name}: {name}"
