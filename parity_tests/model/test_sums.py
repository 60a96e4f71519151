"""Gradients that are sums over many tokens err by one rounding of the float64 sum."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llama_torch.model import loss
from llama_torch.model.config import ModelConfig
from llama_torch.model.embedding import embed
from llama_torch.model.llama import Llama
from llama_torch.model.loss import IGNORE_INDEX
from llama_torch.training import step
from llama_torch.training.batch import Batch, pack_documents, to_batch
from reference_np.naming import EMBED, LM_HEAD
from reference_np.tolerances import FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..conformance.architectures import seeds
from ..support.devices import on_every_device

ROWS, CONTEXT, VOCAB_SIZE = 128, 128, 61
ROUNDING = UNIT_ROUNDOFF["bfloat16"]
END = 3  # of a document, in packed rows


def skewed(generator: torch.Generator) -> Tensor:
    """Draw windows [ROWS, CONTEXT + 1]: half of the tokens are 0, the rest follow Zipf's law."""
    rest = 1 / torch.arange(1, VOCAB_SIZE, dtype=torch.float64)
    shares = torch.cat([rest.sum()[None], rest])
    drawn = torch.multinomial(shares, ROWS * (CONTEXT + 1), True, generator=generator)
    return drawn.view(ROWS, CONTEXT + 1)


def padded(window: Tensor) -> Batch:
    """Return a batch with up to half a row of padding, token 0, before each row; it is masked."""
    tokens, targets, *_ = to_batch(window)
    width = torch.arange(len(window))[:, None] % (CONTEXT // 2)
    place = torch.arange(CONTEXT)
    is_text = place >= width
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril() & is_text[:, None]
    mask |= torch.eye(CONTEXT, dtype=torch.bool)
    targets = targets.masked_fill(~is_text, IGNORE_INDEX)
    return Batch(tokens * is_text, targets, (place - width).clamp(min=0), mask)


INPUTS = {
    "plain": to_batch,
    "packed": lambda window: pack_documents(window, END),
    "padded": padded,
}


@contextmanager
def operands(model: Llama) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect each module's input and its output's gradient, by name, of modules with a weight."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda d_out: found.update({name: (given[0], d_out)}))

        hooks.append(module.register_forward_hook(forward))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.RMSNorm | nn.Embedding):
            watch(name, module)
    yield found
    for hook in hooks:
        hook.remove()


def wide_sum(module: nn.Module, given: Tensor, d_out: Tensor) -> Tensor:
    """Return the gradient of a module's weight in float64, from input and output gradient."""
    d = d_out.double().flatten(0, 1)
    if isinstance(module, nn.Embedding):
        return d.new_zeros(module.weight.shape).index_add_(0, given.flatten(), d)
    x = given.double().flatten(0, 1)
    if isinstance(module, nn.Linear):
        return d.T @ x
    return (d * F.rms_norm(x, x.shape[-1:], eps=module.eps)).sum(0)


def head_sum(model: Llama, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the head [V, D] in float64, from the final norm's output."""
    head = model.head_weight.detach().double().requires_grad_()
    logits = hidden.detach().double().flatten(0, 1) @ head.T
    F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX).backward()
    assert head.grad is not None
    return head.grad


def relative(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach(), exact.detach()
    return float((actual.double() - exact).norm() / exact.norm())


narrow = st.sampled_from([torch.bfloat16, torch.float16])


@on_every_device
@given(seed=seeds, dtype=narrow, vocab_size=st.integers(1, 9), dim=st.integers(1, 5))
def test_an_embedding_is_torchs_with_a_wider_sum(
    device: str, seed: int, dtype: torch.dtype, vocab_size: int, dim: int
) -> None:
    """The rows are the same; their gradient is the float32 sum, to the rounding of its end."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, dim, generator=rng).to(device, dtype).requires_grad_()
    tokens = torch.randint(vocab_size, (3, 200), generator=rng).to(device)
    found = embed(tokens, weight)
    assert torch.equal(found, F.embedding(tokens, weight))
    d_out = (torch.rand(found.shape, generator=rng) * 1e-3).to(device, dtype)
    found.backward(d_out)
    exact = torch.zeros(vocab_size, dim, dtype=torch.float64, device=device)
    exact.index_add_(0, tokens.flatten(), d_out.double().flatten(0, 1))
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    # Half a step of the format, and what 600 float32 additions may make of a tie.
    rounding = torch.finfo(dtype).eps / 2 * (1 + 2.0**-8)
    assert ((weight.grad.double() - exact).abs() <= rounding * exact).all()


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what torch warns of
def test_a_compiled_embedding_sums_the_same() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens, found = torch.randint(7, (2, 900), generator=rng), []
    weight = torch.randn(7, 3, generator=rng).bfloat16().requires_grad_()
    d_out = torch.rand(2, 900, 3, generator=rng).bfloat16()
    for function in (embed, torch.compile(embed, backend="eager", fullgraph=True)):
        weight.grad = None
        function(tokens, weight).backward(d_out)
        found.append(weight.grad)
    assert torch.equal(*found)


@on_every_device
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", INPUTS)
def test_gradients_of_sixteen_thousand_skewed_tokens(
    device: str, is_tied: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of every parameter in bfloat16, the head's from 512 chunks.

    Against the float64 sum of the same operands, to one rounding; and against the model in float64,
    whose operands are not rounded.
    """
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_CUDA"):
        monkeypatch.setattr(loss, name, 32 * VOCAB_SIZE * 2)
    monkeypatch.setattr(loss, "ROWS", ROWS * CONTEXT)  # quicker, where the vocabulary is small
    config = ModelConfig(
        dim=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        hidden_dim=24,
        vocab_size=VOCAB_SIZE,
        max_seq_len=CONTEXT,
        tie_embeddings=is_tied,
    )
    generator = torch.Generator().manual_seed(0)
    model = Llama(config)
    model.init_weights(generator)
    model.to(device, torch.bfloat16)
    batch = INPUTS[kind](skewed(generator)).to(torch.device(device))
    hidden: list[Tensor] = []
    with operands(model) as watched:
        model.model.register_forward_hook(lambda *call: hidden.append(call[2][0].detach()))
        _, grads = step.accumulate(model, [batch])
    named = {name: grads[parameter].clone() for name, parameter in model.named_parameters()}
    sums = {f"{n}.weight": wide_sum(model.get_submodule(n), *of) for n, of in watched.items()}
    sums[LM_HEAD] = head_sum(model, hidden[0], batch.targets)
    if is_tied:
        sums[EMBED] += sums.pop(LM_HEAD)
    model.double().zero_grad()
    _, exact = step.accumulate(model, [batch])
    for name, parameter in model.named_parameters():
        # Tied, each of the two sums is rounded, and then what they add up to.
        roundings = 2 if is_tied and name == EMBED else 1
        error = relative(named[name], sums.pop(name))
        assert error <= roundings * ROUNDING, name
        error = relative(named[name], exact[parameter])
        assert error <= FLOOR_ROUNDINGS * ROUNDING, name
    assert not sums


@on_every_device
def test_the_loss_of_ten_million_targets(device: str) -> None:
    """All targets are alike, so that the exact sum is known."""
    n, (hidden, head) = 10**7, (0.3, [1.0, -0.7])
    logits = hidden * torch.tensor(head, dtype=torch.float64)
    exact = n * (logits.logsumexp(0) - logits[0]).item()
    found = loss.loss_sum(
        torch.full((1, n, 1), hidden, device=device),
        torch.tensor(head, device=device)[:, None],
        torch.zeros(1, n, dtype=torch.int64, device=device),
    )
    assert found.item() == pytest.approx(exact, rel=1e-6)


@on_every_device
@pytest.mark.parametrize("place", [0, 30_000, 50_256])
def test_the_loss_of_a_likely_token_has_what_many_unlikely_ones_add(
    device: str, place: int
) -> None:
    """Each is below half a rounding of the likely one; together they are 0.2% of it."""
    logits = torch.zeros(1, 50_257)
    logits[0, place] = 17.0
    exact = -torch.log_softmax(logits.double(), -1)[0, place].item()
    head, hidden = logits.T.contiguous().to(device), torch.ones(1, 1, 1, device=device)
    found = loss.loss_sum(hidden, head, torch.tensor([[place]], device=device)).item()
    assert found == pytest.approx(exact, rel=1e-3)
