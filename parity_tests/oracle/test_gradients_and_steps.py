"""The training step: gradients by hand, and the torch trainer held to them over whole steps."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.training.optimizer import learning_rate
from reference_np import grad, ops, optim, training_mutants
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.mutants import Mutant
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters
from reference_np.tolerances import FACTOR, FLOOR_ROUNDINGS, LOGIC, UNIT_ROUNDOFF

from ..backends.torch_backends import optim_config
from ..conformance.strategies import Array, Params, cast, random_params, seeds, wide_cases
from ..conformance.training_cases import (
    STEPS_LOGIC,
    TrainingCase,
    fixed_cases,
    size,
    training_cases,
)
from ..planted.operations import scaled
from ..support.torch_training import (
    Trained,
    distances,
    oracle_train,
    torch_grads,
    torch_train,
)

pytestmark = pytest.mark.numeric

# Central differences with step h err by h^2 f''' / 6 + u |f| / h: at 1e-5 some 1e-10 and 1e-11
# relative to a well-scaled f, and 1e-6 of the gradient leaves room for its cancellation.
DIFFERENCE_STEP = 1e-5

DIFFERENCES = 1e-6


def central_difference(f: Callable[[Array], float], x: Array, direction: Array) -> float:
    h = DIFFERENCE_STEP
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


def check_vjp(forward: Callable, inputs: list[Array], d_inputs: list[Array], d_out: Array) -> None:
    """<d_out, f> differentiated numerically along a random direction of each input."""
    rng = np.random.default_rng(0)
    for i, (x, d_x) in enumerate(zip(inputs, d_inputs, strict=True)):
        direction = rng.standard_normal(x.shape)

        def value(moved: Array, i: int = i) -> float:
            return float(np.sum(forward(*inputs[:i], moved, *inputs[i + 1 :]) * d_out))

        numeric = central_difference(value, x, direction)
        analytic = float(np.sum(d_x * direction))
        scale = float(np.sum(np.abs(d_x * direction))) + 1e-3
        assert d_x.shape == x.shape
        assert abs(numeric - analytic) <= DIFFERENCES * scale, f"input {i}"


shape_sizes = st.integers(1, 4)


@given(batch=shape_sizes, length=shape_sizes, groups=shape_sizes, repeats=shape_sizes, seed=seeds)
def test_every_vjp_against_central_differences(
    batch: int, length: int, groups: int, repeats: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    width, dim = 6, 5
    heads = LlamaConfig(dim, 1, 1, 1, width, 8, 8)

    x, w, d = draw((batch, length, dim)), draw((7, dim)), draw((batch, length, 7))
    check_vjp(ops.linear, [x, w], [*grad.linear_vjp(x, w, d)], d)

    w, d = draw(dim), draw((batch, length, dim))
    norm = grad.rms_norm_vjp(x, w, 1e-2, d)
    check_vjp(lambda x, w: ops.rms_norm(x, w, 1e-2), [x, w], [*norm], d)

    tables = ops.rope_tables(rng.integers(0, 99, (batch, length)), heads, np.float64)
    x, d = draw((2, batch, length, groups, width))
    d_x = grad.apply_rope_vjp(*tables, d)
    check_vjp(lambda x: ops.apply_rope(x, *tables), [x], [d_x], d)

    q, k = draw((batch, groups, repeats, length, width)), draw((batch, groups, length, width))
    d = draw((batch, groups, repeats, length, length))
    check_vjp(ops.attention_scores, [q, k], [*grad.attention_scores_vjp(q, k, d)], d)

    scores, mask = draw(d.shape), rng.random((batch, length, length)) < 0.6
    weights = ops.masked_softmax(scores, mask)
    d_scores = grad.masked_softmax_vjp(weights, d)
    check_vjp(lambda s: ops.masked_softmax(s, mask), [scores], [d_scores], d)

    d_mix = draw(q.shape)
    d_parts = grad.attention_mix_vjp(weights, k, d_mix)
    check_vjp(ops.attention_mix, [weights, k], [*d_parts], d_mix)

    gate, up, d = draw((3, batch, length, dim))
    check_vjp(ops.swiglu, [gate, up], [*grad.swiglu_vjp(gate, up, d)], d)

    tokens, table, d = (
        rng.integers(0, 7, (batch, length)),
        draw((7, dim)),
        draw((*x.shape[:2], dim)),
    )
    d_table = grad.embed_vjp(table, tokens, d)
    check_vjp(lambda table: ops.embed(table, tokens), [table], [d_table], d)

    logits, targets = draw((batch, length, 7)), rng.integers(0, 7, (batch, length))
    targets[rng.random(targets.shape) < 0.3] = IGNORE
    d_logits = grad.cross_entropy_vjp(logits, targets, 3, 0.1)
    loss = lambda logits: ops.cross_entropy_sum(logits, targets, 0.1) / 3  # noqa: E731
    check_vjp(loss, [logits], [d_logits], np.ones(()))


@given(case=training_cases())
def test_the_models_gradient_against_central_differences(case: TrainingCase) -> None:
    batch, rng = case.batches[0], np.random.default_rng(0)
    _, grads = loss_and_grads(case.params, batch, case.config, z_loss=0.1)
    assert grads.keys() == case.params.keys()
    name = sorted(grads)[rng.integers(len(grads))]
    direction = rng.standard_normal(grads[name].shape)

    def loss(value: Array) -> float:
        moved = case.params | {name: value}
        return loss_and_grads(moved, batch, case.config, z_loss=0.1)[0]

    numeric = central_difference(loss, case.params[name], direction)
    analytic = float(np.sum(grads[name] * direction))
    scale = float(np.sum(np.abs(grads[name] * direction))) + 1e-2
    assert abs(numeric - analytic) <= 10 * DIFFERENCES * scale, name


def independent_loss(params: dict[str, torch.Tensor], batch: Batch, config: LlamaConfig) -> Any:
    """Llama and its loss once more, in torch primitives and complex rotations alone."""
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    length, half = tokens.shape[1], config.head_dim // 2
    positions = np.arange(length)[None] if batch.positions is None else batch.positions
    causal = np.tril(np.ones((1, length, length), bool))
    mask = torch.from_numpy(causal if batch.mask is None else batch.mask)
    turn = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = scaled(turn, config)
    turn = torch.polar(torch.ones(()).double(), torch.from_numpy(positions)[..., None] * turn)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * x * (x.square().mean(-1, keepdim=True) + config.norm_eps) ** -0.5

    def rotate(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x[..., :half], x[..., half:]) * turn[:, :, None]
        return torch.cat([z.real, z.imag], -1)

    x = params["model.embed_tokens.weight"][tokens]
    for i in range(config.n_layers):
        p = {n.split(".", 3)[3]: v for n, v in params.items() if n.startswith(f"model.layers.{i}.")}
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            torch.einsum("btd,ed->bte", h, p[f"self_attn.{n}_proj.weight"]).unflatten(
                -1, (-1, config.head_dim)
            )
            for n in "qkv"
        )
        reader = torch.arange(config.n_heads) // config.n_rep  # which key head each query reads
        q, k, v = rotate(q), rotate(k)[:, :, reader], v[:, :, reader]
        weight = torch.exp(torch.einsum("bthk,bshk->bhts", q, k) * config.head_dim**-0.5)
        weight = weight * mask[:, None]
        total = weight.sum(-1, keepdim=True)
        weight = weight / torch.where(total == 0, 1.0, total)
        mixed = torch.einsum("bhts,bshk->bthk", weight, v).flatten(2)
        x = x + mixed @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = h @ p["mlp.gate_proj.weight"].T
        hidden = gate / (1 + torch.exp(-gate)) * (h @ p["mlp.up_proj.weight"].T)
        x = x + hidden @ p["mlp.down_proj.weight"].T
    x = norm(x, params["model.norm.weight"])
    head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
    probabilities = torch.softmax(x @ head.T, -1)[targets != IGNORE]
    wanted = targets[targets != IGNORE]
    return -probabilities[torch.arange(len(wanted)), wanted].log().mean()


@given(case=training_cases())
def test_a_third_voice_differentiates_the_same(case: TrainingCase) -> None:
    batch = case.batches[0]
    loss, grads = loss_and_grads(case.params, batch, case.config)
    tensors = {n: torch.tensor(v, requires_grad=True) for n, v in case.params.items()}
    theirs = independent_loss(tensors, batch, case.config)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=LOGIC)
    for name, tensor in tensors.items():
        difference = size(grads[name] - tensor.grad.numpy())
        assert difference <= LOGIC * max(size(grads[name]), 1e-3), name


@given(case=training_cases())
def test_loss_and_gradients_in_float64(case: TrainingCase) -> None:
    loss, grads = optim.accumulate(case.params, case.batches, case.config, case.hyper)
    torch_loss, their_grads = torch_grads(case, np.float64)
    assert torch_loss == pytest.approx(loss, rel=LOGIC)
    for name, expected in grads.items():
        scale = max(size(expected), 1e-3 * max(map(size, grads.values())))
        assert size(their_grads[name] - expected) <= LOGIC * scale, name


@given(case=wide_cases(), z_loss=st.sampled_from([0.0, 1e-2]), seed=seeds)
def test_whole_steps_in_float32(case: Any, z_loss: float, seed: int) -> None:
    """Three steps in float32: at most FACTOR times the plain oracle's own error, plus a floor.

    Measured on each parameter's change and on the moments, as rms over the whole model:
    rounding in the gradients reaches the parameters through Adam's division, which can turn
    one element's sign, so that single elements have no useful bound. How far steps carry a
    rounding is a matter of luck (of ten, by orders of magnitude), so the oracle's error is the
    worst of four: its own, and those from parameters moved by one rounding.
    """
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, case.config.vocab_size, case.tokens.shape)
    params = cast(cast(case.params, np.float32), np.float64)
    hyper = Hyperparameters(lr=1e-3, z_loss=z_loss, warmup_steps=3, steps=12)
    batches = [Batch(case.tokens, targets, case.positions)]
    training = TrainingCase(case.config, params, batches, hyper)
    exact = oracle_train(training, 3, np.float64)
    unit = UNIT_ROUNDOFF["float32"]
    moved_once = (
        {n: v * (1 + unit * rng.choice([-2.0, 2.0], v.shape)) for n, v in params.items()}
        for _ in range(3)
    )
    plain = [
        oracle_train(training._replace(params=start), 3, np.float32)
        for start in (params, *moved_once)
    ]
    actual = torch_train(training, 3, np.float32)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        start = params if kind == "params" else dict.fromkeys(params, 0.0)
        moved = {n: v - start[n] for n, v in getattr(exact, kind).items()}

        def error(found: Trained, kind: str = kind, moved: Params = moved) -> float:
            squares = (
                np.sum((v - getattr(exact, kind)[n]) ** 2) for n, v in getattr(found, kind).items()
            )
            return float(np.sqrt(sum(squares) / sum(np.sum(v**2) for v in moved.values())))

        floor = FLOOR_ROUNDINGS * unit
        assert error(actual) <= FACTOR * max(map(error, plain)) + floor, kind
    for step, (mine, theirs) in enumerate(zip(actual.losses, exact.losses, strict=True)):
        # log Z - l is a difference of numbers near ten, or of the loss's own size, each known to
        # some roundings.
        allowed = max(abs(one.losses[step] - theirs) for one in plain)
        assert abs(mine - theirs) <= FACTOR * allowed + (10 + theirs) * floor


@lru_cache(maxsize=1)
def trained_by_torch() -> tuple[tuple[TrainingCase, Trained], ...]:
    return tuple((case, torch_train(case, 3, np.float64)) for case in fixed_cases())


def margin(**bug: Any) -> tuple[float, str]:
    """How many times its tolerance the worst error is, and where it shows."""
    return max(
        (error / STEPS_LOGIC, kind)
        for case, theirs in trained_by_torch()
        for kind, error in distances(theirs, oracle_train(case, 3, np.float64, **bug)).items()
    )


def test_the_reference_survives_where_mutants_are_killed() -> None:
    assert margin()[0] <= 0.1


@pytest.mark.parametrize("mutant", training_mutants.TRAINING, ids=lambda mutant: mutant.name)
def test_training_mutants_are_killed(mutant: Mutant) -> None:
    """By ten times the tolerance at least; the honest trainer stays under a tenth of it."""
    times, kind = margin(vjps=mutant.apply(grad.REFERENCE), rules=mutant.apply(optim.REFERENCE))
    assert times >= 10, f"{mutant.name}: {times:.1e} times the tolerance, in {kind}"


@given(steps=st.integers(1, 40), warmup=st.integers(0, 50), ratio=st.sampled_from([0.0, 0.1, 1.0]))
def test_schedules_agree(steps: int, warmup: int, ratio: float) -> None:
    hyper = Hyperparameters(steps=steps, warmup_steps=warmup, final_lr_ratio=ratio)
    for step in range(steps + 2):
        theirs = learning_rate(step, steps, optim_config(hyper))
        assert theirs == pytest.approx(optim.learning_rate(step, hyper), rel=1e-14)


@given(case=training_cases())
def test_a_step_changes_nothing_that_goes_in(case: TrainingCase) -> None:
    params = cast(case.params, np.float32)
    before = {name: value.copy() for name, value in params.items()}
    state = optim.init_state(params)
    new, _, metrics = optim.train_step(params, state, case.batches, case.config, case.hyper)
    assert all(np.array_equal(params[name], value) for name, value in before.items())
    assert not any(value.any() for value in state.exp_avg.values())
    assert {value.dtype for value in (*new.values(), *metrics.grads.values())} == {np.dtype("f4")}


def test_the_oracle_learns() -> None:
    """Thirty steps on one batch: the loss falls far below a uniform guess."""
    config = LlamaConfig(16, 2, 4, 2, 4, 40, 30)
    rng = np.random.default_rng(0)
    batch = Batch(*rng.integers(0, 30, (2, 4, 8)))
    params = random_params(config, 0)
    state = optim.init_state(params)
    hyper = Hyperparameters(lr=3e-2, steps=30, warmup_steps=3)
    losses = []
    for _ in range(30):
        params, state, metrics = optim.train_step(params, state, [batch], config, hyper)
        losses.append(metrics.loss)
    assert losses[-1] < 0.2 * losses[0]


def test_a_step_without_valid_targets_is_refused() -> None:
    config = LlamaConfig(4, 1, 2, 1, 2, 4, 5)
    tokens = np.zeros((1, 3), int)
    batch = Batch(tokens, np.full_like(tokens, IGNORE))
    with pytest.raises(InputError, match="valid target"):
        optim.accumulate(random_params(config, 0), [batch], config, Hyperparameters())
