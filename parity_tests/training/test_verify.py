"""--verify-every accepts a correct run, does not change it, and checks for its own memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.step_folders import newest
from llama_torch.config import OptimConfig
from llama_torch.model import loss
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training import run_dir, step, verify
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.objective import TokenLoss
from llama_torch.training.optimizer import make_adamw
from reference_np.ops import IGNORE

from ..conformance.architectures import seeds
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import packed
from ..support.trainer_runs import scalars, stop_after, unsampled_run

pytestmark = pytest.mark.numeric

FLOAT32, BFLOAT16 = ["--dtype", "float32"], ["--dtype", "bfloat16"]
Patch = pytest.MonkeyPatch


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return unsampled_run(tmp_path)


def pack(batch: Batch, rng: np.random.Generator) -> Batch:
    """Return the batch with every row split into the same documents; their ends have no target."""
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
    """Draw a small model after a few steps, the micro-batches of the last step, and the z-loss.

    Not so small that nearly all of a gradient cancels (a norm over a few elements, a softmax over
    two tokens): the relative error of the remainder has no useful bound.
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
            objective = TokenLoss(z_loss)
            step.train_step(made, optimizer, batches, lr=lr, grad_clip=1.0, objective=objective)
    return labelled((made, batches, z_loss), draw.numbers)


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
    """Losses, parameters and moments are equal, resumed or not."""
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
    """A resumed run may have another --verify-every."""
    out = str(tmp_path / "run")
    assert train.main([*flags, "--out", out]) == 0
    assert train.main(["--resume", "--out", out, "--verify-every", "3"]) == 0
    assert run_dir.resolve_config(["--resume", "--out", out, "--verify-every", "3"]).verify_every


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
    """The check uses the shapes of training, so nothing is compiled again."""
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
