"""--verify-every: it sees what is wrong, says nothing of what is right, and changes nothing."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from llama_torch import train
from llama_torch.checkpoint.step_folders import newest
from llama_torch.checkpoint.training_state import STATE_FILE, load_state
from llama_torch.common.errors import InputError
from llama_torch.config import OptimConfig
from llama_torch.model import embedding, llama, loss, rope
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training import loop, oracle, run_dir, step, verify, verify_sums
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.oracle import BoundedError, Observed
from reference_np import grad, ops, optim
from reference_np.config import LlamaConfig
from reference_np.low_precision import plain_ops, plain_vjps, round_to
from reference_np.mutants import FORWARD, Mutant
from reference_np.ops import IGNORE
from reference_np.tolerances import FACTOR, FLOOR_ROUNDINGS, LAMBDA, UNIT_ROUNDOFF
from reference_np.training_mutants import TRAINING

from ..backends.torch_backends import to_torch
from ..backends.torch_model import torch_config, torch_model
from ..conformance.drawn import Draw, composite, told
from ..conformance.oracle import Oracle
from ..conformance.strategies import Array, Case, cast, packed, random_params, seeds, wide_cases
from ..planted.training import NarrowSum, gradient_of
from ..support.trainer_runs import SMALL_RUN, TEXT, scalars, stop_after

pytestmark = pytest.mark.numeric

FLOAT32, BFLOAT16 = ["--dtype", "float32"], ["--dtype", "bfloat16"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return [*SMALL_RUN, "--sample-every", "0", "--data", str(path)]


def pack(batch: Batch, rng: np.random.Generator) -> Batch:
    """Cut every row into the same documents, whose last tokens have no target."""
    rows, length = batch.tokens.shape
    is_first = rng.random(length) < 0.1
    starts = np.flatnonzero(np.r_[True, is_first[1:], True])
    positions, mask = packed(np.diff(starts).tolist())
    targets = batch.targets.clone()
    targets[:, starts[1:-1] - 1] = IGNORE
    wide = [np.broadcast_to(x, (rows, *x.shape[1:])).copy() for x in (positions, mask)]
    return Batch(batch.tokens, targets, *map(torch.from_numpy, wide))


@composite
def trained(draw: Draw) -> Any:
    """A small model after a few steps, the micro-batches of the last, and the z-loss.

    Not so small that nearly all of a gradient cancels (a norm over a few numbers, a softmax over
    two tokens): how much rounding there is in what is left is a matter of luck.
    """
    rng = np.random.default_rng(draw(seeds, label="seed"))
    n_kv_heads = draw(st.integers(1, 3), label="n_kv_heads")
    config = ModelConfig(
        dim=draw(st.integers(8, 64), label="dim"),
        n_layers=draw(st.integers(1, 3), label="n_layers"),
        n_heads=n_kv_heads * draw(st.integers(1, 3), label="n_rep"),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 8), label="head_dim / 2"),
        hidden_dim=draw(st.integers(4, 48), label="hidden_dim"),
        vocab_size=draw(st.integers(16, 300), label="vocab_size"),
        max_seq_len=draw(st.integers(8, 90), label="context"),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 1e-3]), label="norm_eps"),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 37.5]), label="rope_theta"),
        tie_embeddings=draw(st.booleans(), label="tie_embeddings"),
    )
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(int(rng.integers(99))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    optimizer = make_adamw(made, OptimConfig(), dtype)
    z_loss = draw(st.sampled_from([0.0, 1e-2]), label="z_loss")
    rows, parts = draw(st.integers(1, 3), label="rows"), draw(st.integers(1, 3), label="parts")
    is_packed = draw(st.booleans(), label="packed documents")
    lr = draw(st.sampled_from([3e-4, 1e-2, 1e-1]), label="lr")
    for _ in range(draw(st.integers(1, 3), label="steps")):
        shape = (rows * parts, config.max_seq_len + 1)
        window = torch.from_numpy(rng.integers(0, config.vocab_size, shape))
        batches = [to_batch(part) for part in window.split(rows)]
        batches = [pack(batch, rng) if is_packed else batch for batch in batches]
        if any(loss.count_valid(batch.targets) for batch in batches):
            step.train_step(made, optimizer, batches, lr=lr, grad_clip=1.0, z_loss=z_loss)
    return told((made, batches, z_loss), draw.numbers)


@given(case=trained())
def test_what_is_right_holds_and_stays_as_it_is(
    case: tuple[Llama, list[Batch], float],
) -> None:
    made, batches, z_loss = case
    parameters = dict(made.named_parameters())
    before = {name: (p.detach().clone(), p.grad) for name, p in parameters.items()}
    contents = {n: None if g is None else g.clone() for n, (_, g) in before.items()}
    random = torch.get_rng_state()
    measures = verify.check(made, batches, z_loss)
    assert all(m.holds for m in measures), max(measures, key=lambda m: m.share)
    assert [m.quantity for m in measures[:2]] == ["logits", "loss"]
    assert {m.parameter for m in measures[2:]} == parameters.keys()
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in parameters.items():
        value, gradient = before[name]
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, contents[name])


@pytest.mark.parametrize("more", [FLOAT32, [*BFLOAT16, "--grad-accum", "3"]])
def test_a_verified_run_is_the_unverified_one_to_the_bit(
    more: list[str], tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed or not: the same losses, parameters and moments."""
    outs = {name: tmp_path / name for name in ("plain", "verified", "parted")}
    for name, out in outs.items():
        every = [] if name == "plain" else ["--verify-every", "2"]
        with monkeypatch.context() as patch:
            if name == "parted":
                stop_after(3, patch)
            code = train.main([*flags, *more, *every, "--out", str(out)])
        assert code == (130 if name == "parted" else 0)
    assert train.main(["--resume", "--out", str(outs["parted"])]) == 0
    expected, logged = load_file(newest(outs["plain"]) / STATE_FILE), scalars(outs["plain"])
    assert not any(tag.startswith("verify/") for tag in logged)
    for name in ("verified", "parted"):
        found, seen = load_file(newest(outs[name]) / STATE_FILE), scalars(outs[name])
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        for tag in ("train/loss", "train/grad_norm", "val/loss"):
            assert dict(seen[tag]) == dict(logged[tag])
        for quantity in ("logits", "loss", "gradients"):
            errors, bounds = (
                dict(seen[f"verify/{quantity}_{kind}"]) for kind in ("error", "bound")
            )
            assert list(errors) == list(bounds) == [2, 4, 6]
            assert all(errors[at] <= bounds[at] for at in errors)


def test_a_run_may_be_verified_from_where_it_is_resumed(tmp_path: Path, flags: list[str]) -> None:
    """Another --verify-every is not another run."""
    out = str(tmp_path / "run")
    assert train.main([*flags, "--out", out]) == 0
    assert train.main(["--resume", "--out", out, "--verify-every", "3"]) == 0
    assert run_dir.resolve_config(["--resume", "--out", out, "--verify-every", "3"]).verify_every


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
    """Keys learn nothing."""
    real = F.scaled_dot_product_attention
    patch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, *rest, **more: real(q, k.detach(), *rest, **more),
    )


def ignored_learnt(patch: Patch) -> None:
    real = loss._differentiate_rows
    patch.setattr(loss, "_differentiate_rows", lambda x, t, *rest: real(x, t.clamp(min=0), *rest))


def mean_of_means(patch: Patch) -> None:
    real = loss.backward_loss

    def backward(hidden: Tensor, head: Tensor, targets: Tensor, n: int, z: float) -> Tensor:
        return real(hidden, head, targets, 2 * loss.count_valid(targets), z)

    patch.setattr(step, "backward_loss", backward)


def last_gradient_alone(patch: Patch) -> None:
    """Of several micro-batches, one."""
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
    """Planted in step 3: the check after step 2 holds and the one after step 4 does not."""
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


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_fails_at_the_257th_occurrence_is_seen(
    dtype: torch.dtype, is_tied: bool, monkeypatch: Patch
) -> None:
    """In a micro-batch half of whose tokens are one: added up in bfloat16, as torch's CPU does."""
    config = ModelConfig(16, 1, 2, 1, vocab_size=50, max_seq_len=128, tie_embeddings=is_tied)
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(0))
    made.to(dtype)
    window = torch.randint(50, (8, 129), generator=torch.Generator().manual_seed(1))
    window[:, ::2] = 7
    batches = [to_batch(window)]
    right = verify.check(made, batches, 0.0)
    monkeypatch.setattr(embedding, "embed", lambda ids, weight: NarrowSum.apply(weight, ids))
    wrong = verify.check(made, batches, 0.0)
    assert [m.parameter for m in (right[-1], wrong[-1])] == ["model.embed_tokens.weight"] * 2
    assert all(m.holds for m in right)
    assert wrong[-1].share > 3 > 2 * right[-1].share
    # What few tokens show of it is a rounding of bfloat16, which a model in it may make.
    assert all(m.holds for m in wrong[:-1]) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_terms_that_overflowed_excuse_no_finite_sum(bad: float) -> None:
    tokens, d_out = torch.tensor([0, 1, 0]), torch.ones(3, 4)
    d_out[1, 2] = bad
    found = torch.full((2, 4), 2.0)
    error, bound = verify_sums._worst(verify_sums.Terms(tokens, d_out, None, found), LAMBDA)
    assert error == math.inf > bound


def test_tokens_that_occur_once_have_no_error() -> None:
    made = Llama(ModelConfig(16, 1, 2, 1, vocab_size=50, max_seq_len=8, tie_embeddings=False))
    made.init_weights(torch.Generator().manual_seed(0))
    *_, found = verify.check(made, [to_batch(torch.arange(1, 10)[None])], 0.0)
    assert (found.parameter, found.error, found.share) == ("model.embed_tokens.weight", 0.0, 0.0)


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
# part's targets all count (the live model's do not: see ignored_learnt above).
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
    """A model and the rows that it is verified on."""

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


def computed(given: Setting, bug: Mutant | None) -> Observed:
    """What the oracle computes in float32, with one bug or none."""
    parts: tuple[Any, ...] = (ops, grad.REFERENCE, optim.REFERENCE)
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


def judged(given: Setting, observed: Observed, precision: str) -> list[BoundedError]:
    config = torch_config(given.config)
    return oracle.bound_errors(config, given.weights, given.batches, observed, precision, Z_LOSS)


def share(precision: str, bug: Mutant | None) -> float:
    """The largest error as a share of its bound, of a model with tied embeddings or without."""
    given = [setting(getattr(torch, precision), is_tied) for is_tied in (False, True)]
    measures = [judged(one, computed(one, bug), precision) for one in given]
    return max(m.share for m in itertools.chain(*measures))


@pytest.fixture
def _references_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute what a model of ``setting`` is judged by once, and not for every bug."""
    known: dict[Any, Any] = {}
    real = oracle._compute

    def compute(config: LlamaConfig, params: Any, batches: Any, z_loss: float, kind: str) -> Any:
        key = config, params.dtype, params.moved, z_loss, kind
        if key not in known:
            known[key] = real(config, params, batches, z_loss, kind)
        return known[key]

    monkeypatch.setattr(oracle, "_compute", compute)


@pytest.mark.usefixtures("_references_once")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_known_bug_that_can_show_does(precision: str) -> None:
    """In float32 by ten times its bound; in bfloat16 those that are more than its rounding."""
    assert share(precision, None) < 0.5
    unseen = NOT_SHOWN | OF_THE_UPDATE | (FAINT if precision == "bfloat16" else set())
    shares = {bug.name: share(precision, bug) for bug in (*FORWARD, *TRAINING)}
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
    low = {"ops": plain_ops("bfloat16"), "vjps": plain_vjps("bfloat16")}
    _, plain = grad.loss_and_grads(single, batch, case.config, **low)
    trained = torch_model(case.config, single).bfloat16().requires_grad_(True)
    _, theirs = step.accumulate(trained, [to_torch(batch)])
    torchs = {name: theirs[p].float().numpy() for name, p in trained.named_parameters()}

    def error(grads: Mapping[str, Array]) -> float:
        wrong = sum(np.sum((grads[name] - value) ** 2) for name, value in exact.items())
        return float(np.sqrt(wrong / sum(np.sum(value**2) for value in exact.values())))

    floor = FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"]
    assert 0 < error(plain) <= FACTOR * error(torchs) + floor
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
    observed = computed(given, bug)
    as_tf32, as_float32 = (judged(given, observed, kind)[0] for kind in ("tf32", "float32"))
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
    one, again, other = (oracle._Weights(weights, torch.float32, moved) for moved in (1, 1, 2))
    value = weights["a"].float().numpy()
    moved = np.abs(one["a"] - value) / np.abs(value)
    assert np.all((moved > 0) & (moved <= 2 * torch.finfo(dtype).eps))
    assert np.array_equal(one["a"], again["a"])
    assert not np.array_equal(one["a"], other["a"])


@pytest.mark.parametrize("bad", ["missing", "nan", "shape"])
def test_what_is_not_there_does_not_hold(bad: str) -> None:
    given = setting(torch.float32, True)
    observed, name = computed(given, None), "model.layers.1.mlp.up_proj.weight"
    grads = dict(observed.grads)
    if bad == "missing":
        del grads[name]
    else:
        grads[name] = grads[name][:1] if bad == "shape" else grads[name] * math.nan
    found = judged(given, observed._replace(grads=grads), "float32")
    assert [m.parameter for m in found if not m.holds] == [name]
    assert f"1 gradients, worst of {name}: error inf" in verify.complaint(found, Path("none"), 7)
    found = judged(given, observed._replace(loss=math.nan), "float32")
    assert [m.quantity for m in found if not m.holds] == ["loss"]


@pytest.mark.parametrize("bad", [math.nan, 1e38])
def test_weights_that_overflow_are_no_breach(bad: float) -> None:
    given = setting(torch.float32, True)
    observed = computed(given, None)
    given.weights["model.layers.1.mlp.up_proj.weight"] *= bad
    with pytest.raises(InputError, match="overflows too; lower --lr"):
        judged(given, observed, "float32")


def test_what_no_memory_can_hold_is_refused(
    tmp_path: Path, flags: list[str], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "BYTES_PER_PARAMETER", 1 << 40)
    out = tmp_path / "run"
    assert train.main([*flags, "--verify-every", "1", "--out", str(out)]) == 2
    assert "--verify-every needs some" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what torch warns of
def test_a_compiled_model_is_verified_as_it_trains() -> None:
    """In the shapes that it was compiled for: a check compiles nothing."""
    made = Llama(ModelConfig(16, 2, 2, 1, hidden_dim=24, vocab_size=50, max_seq_len=20))
    made.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_adamw(made, OptimConfig(), torch.bfloat16)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # of what was compiled before, which a reset leaves
    for layer in made.model.layers:
        layer.compile(backend="eager", fullgraph=True, dynamic=False)
    window = torch.randint(50, (6, 21), generator=torch.Generator().manual_seed(0))
    batches = [to_batch(part) for part in window.split(3)]
    step.train_step(made, optimizer, batches, lr=1e-3, grad_clip=1.0)
    counts = torch._dynamo.utils.counters["stats"]
    before = dict(counts)
    assert before["unique_graphs"] == 1
    assert all(measure.holds for measure in verify.check(made, batches, 0.0))
    assert dict(counts) == before
    made.model(batches[0].tokens[:, :-1])
    assert dict(counts) != before  # another shape would have been seen
