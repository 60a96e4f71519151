"""Bounds of --verify-every's oracle: every known bug exceeds them, and rounding does not."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_common.errors import InputError
from llama_torch.training import error_bounds, oracle, step, verify
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.error_bounds import BoundedError, Observed
from reference_np import grad, ops, optim
from reference_np.config import LlamaConfig
from reference_np.low_precision import round_to, rounded_ops, rounded_vjps
from reference_np.mutants import FORWARD, Mutant
from reference_np.tolerances import BASELINE_FACTOR, FLOOR_ROUNDINGS, UNIT_ROUNDOFF
from reference_np.training_mutants import TRAINING

from ..backends.torch_backends import to_torch
from ..backends.torch_model import torch_config, torch_model
from ..conformance.oracle import Oracle
from ..conformance.strategies import Array, Case, cast, random_params, wide_cases

pytestmark = pytest.mark.numeric

Patch = pytest.MonkeyPatch


CONFIG = LlamaConfig(
    dim=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=6,
    hidden_dim=40,
    vocab_size=50,
    rope_theta=5e5,
    rope_type="llama3",
    rope_factor=8.0,
    rope_low_freq_factor=0.3,
    rope_high_freq_factor=12.0,
    rope_original_max_seq_len=64,
)
# What one causal call on few positions cannot show: decoding, padding, far positions; and that a
# part's targets all count (a live model's do not: ignored_learnt in test_verify_faults.py).
NOT_SHOWN = {
    *("positions_doubled", "positions_one_more", "positions_from_zero", "mask_top_left"),
    *("cache_first_row", "cache_trimmed", "rope_decode_tables", "left_padding_in_positions"),
    *("rope_positions_bf16", "rope_angles_float32", "padding_learnt"),
}
# What the update does with gradients is not verified.
OF_THE_UPDATE = {
    *("clip_each", "clip_always", "clip_by_value", "adam_uncorrected", "adam_eps_inside"),
    *("adam_step_from_one_too_many", "decay_in_gradient", "decay_without_rate", "decay_on_norms"),
}
# What bfloat16's own rounding hides.
FAINT = {
    *("norm_eps_tenth", "norm_eps_outside", "norm_variance", "norm_low_precision"),
    *("rope_tables_bf16", "rope_frequencies_bf16", "softmax_low_precision"),
    *("matmul_tf32", "matmul_bf16"),
    *("rope_theta_ignored", "z_loss_forgotten", "embedding_sum_bf16"),
}
Z_LOSS = 1e-2


class Setting(NamedTuple):
    """A model and the rows it is verified with."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    batches: list[Batch]


def setting(dtype: torch.dtype, is_tied: bool) -> Setting:
    config = dataclasses.replace(CONFIG, tie_embeddings=is_tied)
    params = random_params(config, 1, 0.05)  # small embeddings make the norms' epsilon count
    weights = {name: torch.from_numpy(value).to(dtype) for name, value in params.items()}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, 41))
    batches = [to_batch(part) for part in torch.from_numpy(ids).split(2)]
    return Setting(config, weights, verify.pick(batches))


def oracle_results(given: Setting, bug: Mutant | None) -> Observed:
    """Return the oracle's results in float32, with one bug or none."""
    parts: tuple[Any, ...] = (ops, grad.REFERENCE_VJPS, optim.REFERENCE_RULES)
    spec = Oracle(*(parts if bug is None else map(bug.apply, parts)))
    params = {name: weight.float().numpy() for name, weight in given.weights.items()}
    sizes = zip(given.batches, oracle.PARTS, strict=True)
    batches = [
        grad.Batch(*(x[:rows, :length].numpy() for x in batch[:2]))
        for batch, (rows, length) in sizes
    ]
    logits = [spec.logits(given.config, params, b.tokens, None, None) for b in batches]
    found, grads = spec.loss_and_grads(given.config, params, batches, Z_LOSS)
    tensors = {name: torch.from_numpy(np.array(g)) for name, g in grads.items()}
    return Observed([torch.from_numpy(np.array(x)) for x in logits], found, tensors)


def bounded_errors(given: Setting, observed: Observed, precision: str) -> list[BoundedError]:
    config = torch_config(given.config)
    return error_bounds.bound_errors(
        config, given.weights, given.batches, observed, precision, Z_LOSS
    )


def largest_share(precision: str, bug: Mutant | None) -> float:
    """Return the largest error / bound of a model with tied or untied embeddings."""
    given = [setting(getattr(torch, precision), is_tied) for is_tied in (False, True)]
    measures = [bounded_errors(one, oracle_results(one, bug), precision) for one in given]
    return max(m.share for m in itertools.chain(*measures))


@pytest.fixture
def _references_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the reference results of ``setting`` once for all bugs."""
    known: dict[Any, Any] = {}
    real = oracle.compute

    def compute(config: LlamaConfig, params: Any, batches: Any, z_loss: float, kind: str) -> Any:
        key = config, params.dtype, params.perturbation, z_loss, kind
        if key not in known:
            known[key] = real(config, params, batches, z_loss, kind)
        return known[key]

    monkeypatch.setattr(oracle, "compute", compute)


@pytest.mark.usefixtures("_references_once")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_known_bug_that_can_show_does(precision: str) -> None:
    """In float32 by ten times its bound; in bfloat16 those that are more than its rounding."""
    assert largest_share(precision, None) < 0.5
    unseen = NOT_SHOWN | OF_THE_UPDATE | (FAINT if precision == "bfloat16" else set())
    shares = {bug.name: largest_share(precision, bug) for bug in (*FORWARD, *TRAINING)}
    assert unseen == {name for name, found in shares.items() if found <= 1}
    least = min(found for name, found in shares.items() if name not in unseen)
    assert least >= (10 if precision == "float32" else 1)


@given(case=wide_cases())
@settings(max_examples=10)
def test_plain_gradients_in_bfloat16_excuse_nothing(case: Case) -> None:
    """The baseline errs no more than torch does, as torch errs no more than it."""
    weights = {name: torch.from_numpy(v).bfloat16() for name, v in case.params.items()}
    single = {name: weight.float().numpy() for name, weight in weights.items()}
    batch = grad.Batch(case.tokens, np.roll(case.tokens, -1, axis=1), case.positions)
    _, exact = grad.loss_and_grads(cast(single, np.float64), batch, case.config)
    low = {"ops": rounded_ops("bfloat16"), "vjps": rounded_vjps("bfloat16")}
    _, plain = grad.loss_and_grads(single, batch, case.config, **low)
    trained = torch_model(case.config, single).bfloat16().requires_grad_(True)
    _, theirs = step.accumulate(trained, [to_torch(batch)])
    torchs = {name: theirs[p].float().numpy() for name, p in trained.named_parameters()}

    def error(grads: Mapping[str, Array]) -> float:
        wrong = sum(np.sum((grads[name] - value) ** 2) for name, value in exact.items())
        return float(np.sqrt(wrong / sum(np.sum(value**2) for value in exact.values())))

    floor = FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"]
    assert 0 < error(plain) <= BASELINE_FACTOR * error(torchs) + floor
    assert all(np.array_equal(g, round_to(g, "bfloat16")) for g in plain.values() if g.ndim == 1)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_tf32_keeps_eleven_bits(values: list[float]) -> None:
    x = np.array(values, np.float32)
    low = round_to(x, "tf32")
    assert not np.any(low.view(np.uint32) & 0x1FFF)
    normal = (np.abs(x) >= 2.0**-126) & np.isfinite(low)  # the largest round to infinity
    assert np.all(np.abs(low - x)[normal] <= 2.0**-11 * np.abs(x)[normal])
    assert np.all(np.abs(x[~np.isfinite(low)]) > 3.4e38)


def test_products_in_tf32_are_judged_as_such() -> None:
    """Right in their own precision, and wrong where float32 was to be had."""
    given = setting(torch.float32, True)
    bug = next(mutant for mutant in FORWARD if mutant.name == "matmul_tf32")
    observed = oracle_results(given, bug)
    as_tf32, as_float32 = (bounded_errors(given, observed, kind)[0] for kind in ("tf32", "float32"))
    assert 0.01 < as_tf32.share < 1 < as_float32.share


def test_the_precision_of_products_is_found_out(monkeypatch: Patch) -> None:
    cpu = torch.device("cpu")
    torch.set_float32_matmul_precision("highest")
    assert verify.arithmetic(cpu, torch.float32) == "float32"
    assert verify.arithmetic(cpu, torch.bfloat16) == "bfloat16"
    real = Tensor.__matmul__
    for kind in ("tf32", "bfloat16"):

        def low(a: Tensor, b: Tensor, kind: str = kind) -> Tensor:
            return real(*(torch.from_numpy(round_to(x.numpy(), kind)) for x in (a, b)))

        monkeypatch.setattr(Tensor, "__matmul__", low)
        assert verify.arithmetic(cpu, torch.float32) == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_tries_are_from_weights_one_rounding_away(dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)}
    one, again, other = (oracle.OracleWeights(weights, torch.float32, moved) for moved in (1, 1, 2))
    value = weights["a"].float().numpy()
    moved = np.abs(one["a"] - value) / np.abs(value)
    assert np.all((moved > 0) & (moved <= 2 * torch.finfo(dtype).eps))
    assert np.array_equal(one["a"], again["a"])
    assert not np.array_equal(one["a"], other["a"])


@pytest.mark.parametrize("bad", ["missing", "nan", "shape"])
def test_what_is_not_there_does_not_hold(bad: str) -> None:
    given = setting(torch.float32, True)
    observed, name = oracle_results(given, None), "model.layers.1.mlp.up_proj.weight"
    grads = dict(observed.grads)
    if bad == "missing":
        del grads[name]
    else:
        grads[name] = grads[name][:1] if bad == "shape" else grads[name] * math.nan
    found = bounded_errors(given, observed._replace(grads=grads), "float32")
    assert [m.parameter for m in found if not m.holds] == [name]
    assert f"1 gradients, worst of {name}: error inf" in verify.complaint(found, Path("none"), 7)
    found = bounded_errors(given, observed._replace(loss=math.nan), "float32")
    assert [m.quantity for m in found if not m.holds] == ["loss"]


@pytest.mark.parametrize("bad", [math.nan, 1e38])
def test_weights_that_overflow_are_no_breach(bad: float) -> None:
    given = setting(torch.float32, True)
    observed = oracle_results(given, None)
    given.weights["model.layers.1.mlp.up_proj.weight"] *= bad
    with pytest.raises(InputError, match="overflows too; lower --lr"):
        bounded_errors(given, observed, "float32")
