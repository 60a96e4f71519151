"""Attention within documents without a mask: as under the mask, and as each document alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llama_torch.model import attention
from llama_torch.model.llama import Llama
from llama_torch.model.masks import Documents, document_mask
from llama_torch.training import step, validate
from llama_torch.training.batch import Batch, by_document
from llama_torch.training.compile import compile_blocks
from reference_np import grad
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.tolerances import BASELINE_FACTOR, FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..backends.torch_model import torch_model
from ..conformance.strategies import Params, random_params
from ..support.devices import no_gpu, on_every_device

pytestmark = pytest.mark.numeric

VOCAB_SIZE, LENGTH = 30, 300  # more positions than the kernel takes at a time, twice
# Documents of two rows, some within one of the kernel's blocks, some in several, one of a token.
LENGTHS = ((150, 1, 40, 109), (3, 297))


def numbers(lengths: Sequence[Sequence[int]]) -> Tensor:
    """Return the number of each token's document in its row, int64 [B, T]."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )


def model_config(head_dim: int = 8, n_kv_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(32, 2, 4, n_kv_heads, head_dim, 48, VOCAB_SIZE, LENGTH)


def packed(lengths: Sequence[Sequence[int]], seed: int = 0) -> Batch:
    """Return a micro-batch of documents with these lengths, in each of which all is learnt."""
    document_BT = numbers(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCAB_SIZE, (2, *document_BT.shape), generator=generator)
    return by_document(tokens, targets, document_BT)


def weights(q_PHK: Tensor, k_PHK: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and the softmax [H, P, P] of documents that begin at ``bounds``."""
    place = torch.arange(len(q_PHK), device=q_PHK.device)
    document = torch.searchsorted(bounds, place, right=True)
    scores = torch.einsum("phk,shk->hps", q_PHK, k_PHK) / q_PHK.shape[-1] ** 0.5
    scores = scores.masked_fill(~document_mask(document[None]), -torch.inf)
    return scores, scores.softmax(-1)


class PlainKernel:
    """Both passes of the kernel in torch's operations, for the CPU; counts the calls of each."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Check the bounds; return attention [P, H, K] and its log-sum-exp [H, P]."""
        self.forwards += 1
        assert bounds.dtype == torch.int32
        assert bounds[[0, -1]].tolist() == [0, len(q)]
        assert bounds.diff().min() > 0
        assert bounds.diff().max() <= longest < bounds.diff().max() + attention.BLOCK
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores, p = weights(q, k, bounds)
        out = torch.einsum("hps,shk->phk", p, v)
        return out.contiguous(), scores.logsumexp(-1).float()

    def backward(
        self, flat: Sequence[Tensor], log_sum_exp: Tensor, bounds: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        self.backwards += 1
        d_out, q, k, v, out = flat
        groups = k.shape[1], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups[1], 1) for x in (k, v))
        scores, p = weights(q, k, bounds)
        assert torch.equal(scores.logsumexp(-1).float(), log_sum_exp)
        d_p = torch.einsum("phk,shk->hps", d_out, v)
        d_scores = p * (d_p - (d_out * out).sum(-1).T[..., None]) / q.shape[-1] ** 0.5
        d_q = torch.einsum("hps,shk->phk", d_scores, k)
        d_k = torch.einsum("hps,phk->shk", d_scores, q)
        d_v = torch.einsum("hps,phk->shk", p, d_out)
        d_k, d_v = (x.unflatten(1, groups).sum(2) for x in (d_k, d_v))
        return d_q.contiguous(), d_k, d_v


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> PlainKernel:
    """Return a kernel that models on the CPU use."""
    plain = PlainKernel()
    monkeypatch.setattr(attention, "_forward", plain.forward)
    monkeypatch.setattr(attention, "_backward", plain.backward)
    monkeypatch.setattr(attention, "has_kernel", lambda x, head_dim: True)
    return plain


def new_model() -> Llama:
    config = model_config()
    return torch_model(config, random_params(config, 3)).train().requires_grad_(True)


def loss_and_grads(model: Llama, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    loss, grads = step.accumulate(model, [batch])
    return [loss, *(grads[p].clone() for p in model.parameters())]


def require_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("cheap", 1), ("all", 2)])
def test_documents_without_a_mask_are_those_under_it(
    kernel: PlainKernel, recompute: str, forwards: int
) -> None:
    """Of all layers; attention is computed again by --recompute all alone."""
    batch, model = packed(LENGTHS), new_model()
    expected = loss_and_grads(model, batch._replace(mask=batch.dense_mask))
    assert kernel.forwards == 0
    assert not compile_blocks(model, "no", recompute)
    require_close(loss_and_grads(model, batch), expected)
    assert (kernel.forwards, kernel.backwards) == (forwards * 2, 2)
    windows = [torch.zeros(1)]  # a validation, without gradients
    found = validate.validation_loss(model, windows, lambda _: batch)
    assert found == pytest.approx(expected[0].item(), rel=1e-12)
    assert kernel.forwards == (forwards + 1) * 2


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what torch warns of
def test_other_documents_compile_nothing_anew(kernel: PlainKernel) -> None:
    model, plain = new_model(), new_model()
    torch._dynamo.reset()  # other tests' blocks
    backend = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)
    each: list[Sequence[Sequence[int]]] = [LENGTHS, [[300]] * 2, [[1] * 300, [100] * 3]]
    for seed, lengths in enumerate(each):
        batch = packed(lengths, seed)
        expected = loss_and_grads(plain, batch._replace(mask=batch.dense_mask))
        require_close(loss_and_grads(model, batch), expected)
    assert backend.frame_count == 1


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    n_rows=st.integers(1, 3),
    n=st.integers(1, 4),
)
def test_positions_behind_the_rows_change_none_of_them(
    lengths: list[int], n_rows: int, n: int
) -> None:
    """As --tp puts them, where windows do not divide."""
    rows = [lengths[i % len(lengths) :] + lengths[: i % len(lengths)] for i in range(n_rows)]
    mask = packed(rows).mask
    assert isinstance(mask, Documents)
    wide, length = mask.padded(n_rows, n), sum(lengths)
    assert torch.equal(mask.dense(n_rows), document_mask(numbers(rows)))
    assert torch.equal(wide.dense(n_rows)[:, :length, :length], mask.dense(n_rows))
    assert not wide.dense(n_rows)[:, :length, length:].any()
    is_start = numbers(rows).diff(prepend=torch.full((n_rows, 1), -1)) != 0
    same = Documents.from_starts(torch.nn.functional.pad(is_start, (0, n)))
    assert torch.equal(wide.starts, same.starts)
    assert wide.sizes[0] == same.sizes[0]
    assert wide.sizes[1] >= same.sizes[1]


class Results(NamedTuple):
    """Logits [B, T, V], and the gradients of the step's mean loss, as NumPy arrays in float64."""

    logits: Any
    grads: dict[str, Any]


def rounded_params(config: LlamaConfig) -> Params:
    """Return parameters in float64 that are bfloat16 numbers."""
    params = random_params(config, 5)
    return {name: x.astype(ml_dtypes.bfloat16).astype(np.float64) for name, x in params.items()}


def alone(batch: Batch) -> list[Batch]:
    """Return each document of a micro-batch as a row of its own."""
    rows = zip(batch.tokens, batch.targets, LENGTHS, strict=True)
    each = [zip(x.split(row), y.split(row), strict=True) for x, y, row in rows]
    return [Batch(x[None], y[None]) for row in each for x, y in row]


def results(model: Llama, batches: Sequence[Batch]) -> Results:
    """Return those of our model, rows one behind the other in one."""
    _, grads = step.accumulate(model, batches)
    on_device = [batch.to(model.head_weight.device) for batch in batches]
    with torch.no_grad():
        each = [model(b.tokens, positions=b.positions, mask=b.mask)[0] for b in on_device]
    logits = np.concatenate([as_array(x).reshape(-1, VOCAB_SIZE) for x in each])
    return Results(logits, {n: as_array(grads[p]) for n, p in model.named_parameters()})


def as_array(x: Tensor) -> Any:
    return x.detach().double().cpu().numpy()


def exact_results(config: LlamaConfig, params: Params, batches: Sequence[Batch]) -> Results:
    """Return the oracle's, of each document alone."""
    n_valid = sum(batch.targets.numel() for batch in batches)
    logits, total = [], {name: np.zeros_like(x) for name, x in params.items()}
    for batch in batches:
        given = grad.Batch(batch.tokens.numpy(), batch.targets.numpy())
        _, grads = grad.loss_and_grads(params, given, config, n_valid=n_valid)
        total = {name: total[name] + grads[name] for name in total}
        logits.append(forward(params, given.tokens, config)[0].reshape(-1, VOCAB_SIZE))
    return Results(np.concatenate(logits), total)


def error(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """Return the error's root mean square as a part of the exact values' over all arrays."""
    wrong = sum(np.sum((x - y) ** 2) for x, y in zip(found, exact, strict=True))
    return float(np.sqrt(wrong / sum(np.sum(y**2) for y in exact)))


@on_every_device
@pytest.mark.parametrize(("head_dim", "n_kv_heads"), [(8, 4), (64, 2), (128, 1)])
def test_a_document_in_a_packed_row_is_the_document_alone(
    device: str, head_dim: int, n_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients in bfloat16, against the oracle's of each document, beside our own."""
    config = model_config(head_dim, n_kv_heads)
    params, batch = rounded_params(config), packed(LENGTHS)
    single = {name: x.astype(np.float32) for name, x in params.items()}
    model = torch_model(config, single).to(device, torch.bfloat16).requires_grad_(True)
    calls = []
    real = attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *given: calls.append(0) or real(*given))
    found = results(model, [batch])
    assert len(calls) == (4 if device == "cuda" else 0)  # of two layers, with gradients and without
    model.zero_grad()
    plain = results(model, alone(batch))
    exact = exact_results(config, params, alone(batch))
    floor = FLOOR_ROUNDINGS * UNIT_ROUNDOFF["bfloat16"]
    mine, theirs = error([found.logits], [exact.logits]), error([plain.logits], [exact.logits])
    assert 0 < mine <= BASELINE_FACTOR * theirs + floor, f"{mine}, alone {theirs}"
    assert mine < 0.1  # and small in itself
    for name, value in exact.grads.items():
        mine, theirs = error([found.grads[name]], [value]), error([plain.grads[name]], [value])
        assert 0 < mine <= BASELINE_FACTOR * theirs + floor, f"{name}: {mine}, alone {theirs}"


@no_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "n_kv_heads"), [(8, 1), (24, 2), (64, 4), (128, 1), (128, 4), (192, 2)]
)
def test_the_kernel_is_attention_under_the_mask(
    head_dim: int, n_kv_heads: int, dtype: torch.dtype
) -> None:
    """Results and gradients, against plain sums in float64, beside torch's under the mask."""
    one_each, one = [[1] * 300] * 2, [[300]] * 2
    for lengths in (LENGTHS, one_each, one):
        documents = packed(lengths).to(torch.device("cuda")).mask
        assert isinstance(documents, Documents)
        generator = torch.Generator("cuda").manual_seed(7)
        new = partial(torch.randn, device="cuda", dtype=dtype, generator=generator)
        shapes = [(2, heads, LENGTH, head_dim) for heads in (4, n_kv_heads, n_kv_heads)]
        given = [new(shape).requires_grad_() for shape in shapes]
        d_out = new(shapes[0])
        assert attention.has_kernel(given[0], head_dim)

        def run(given: Sequence[Tensor], mask: Documents | Tensor, d_out: Tensor) -> list[Any]:
            out = attention.attend(*given, mask, False, n_kv_heads != 4)
            grads = torch.autograd.grad(out, given, d_out)
            return [as_array(x) for x in (out, *grads)]

        dense = documents.dense(2)[:, None]
        found, plain = run(given, documents, d_out), run(given, dense, d_out)
        exact = run([x.detach().double().requires_grad_() for x in given], dense, d_out.double())
        unit = UNIT_ROUNDOFF[str(dtype).removeprefix("torch.")]
        for i, name in enumerate(("out", "dq", "dk", "dv")):
            if np.abs(exact[i]).max() < 1e-9:  # the scores of a single token are not learnt
                assert np.abs(found[i]).max() <= FLOOR_ROUNDINGS * unit * np.abs(exact[0]).max()
                continue
            mine, theirs = error([found[i]], [exact[i]]), error([plain[i]], [exact[i]])
            assert mine <= BASELINE_FACTOR * theirs + FLOOR_ROUNDINGS * unit, (lengths, name, mine)
