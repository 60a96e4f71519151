"""Perplexity: which window scores which token, the loss itself, and what is counted."""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.inference import perplexity
from llama_torch.inference.perplexity import Measurement, evaluate, spans
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.loss import IGNORE_INDEX
from llama_torch.tokenizer.tokenizer import Gpt2, Tokenizer
from reference_np import model as oracle
from reference_np.config import LlamaConfig
from reference_np.ops import cross_entropy_sum

from ..backends.torch_model import torch_model
from ..conformance.architectures import seeds
from ..conformance.strategies import Params, random_params

pytestmark = pytest.mark.numeric
CONFIG = LlamaConfig(
    dim=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, hidden_dim=16, vocab_size=29
)
BOS = 28


class Letters(Tokenizer):
    """Tokenizer whose ids are code points, for texts of chosen ids."""

    def __init__(self, prefix: Sequence[int] = (BOS,)) -> None:
        super().__init__({"<a>": 25, "<b>": 26, "<c>": 27, "<s>": BOS}, BOS + 1)
        self.prefix = tuple(prefix)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode_ordinary(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


texts = st.text(st.characters(max_codepoint=24), min_size=1, max_size=14)


@st.composite
def windows(draw: st.DrawFn, most: int = 12) -> tuple[int, int]:
    """Draw a context and a stride within it."""
    context = draw(st.integers(1, most), label="context")
    return context, draw(st.integers(1, context), label="stride")


def oracle_loss(params: Params, ids: Sequence[int]) -> float:
    """Return the loss in nats of every token after the first, read as one window."""
    logits, _ = oracle.forward(params, np.array([ids[:-1]]), CONFIG)
    return float(cross_entropy_sum(logits, np.array([ids[1:]])))


def token_loss(params: Params, ids: Sequence[int], at: int, window: tuple[int, int]) -> float:
    """Return one token's loss by the definition: its own window, computed alone, ends before it.

    The first window predicts ids 1 to ``context``; each later one the next ``stride``, and reads
    the ``context`` ids before the last that it predicts.
    """
    context, stride = window
    last = context + stride * max(0, math.ceil((at - context) / stride))
    start = max(0, min(last, len(ids) - 1) - context)
    logits, _ = oracle.forward(params, np.array([ids[start:at]]), CONFIG)
    return float(cross_entropy_sum(logits[:, -1:], np.array([[ids[at]]])))


@given(window=windows(), length=st.integers(0, 40), first=st.integers(1, 3))
def test_every_token_is_scored_once(window: tuple[int, int], length: int, first: int) -> None:
    context, stride = window
    found = list(spans(length, first, context, stride))
    scored = [at for _, begin, end in found for at in range(begin, end)]
    assert scored == list(range(first, length))
    for n, (start, begin, end) in enumerate(found):
        assert 0 <= start < begin < end
        assert end - 1 - start == min(context, end - 1), "a window as full as the document lets it"
        assert n == 0 or end - begin <= stride
        assert n in (0, len(found) - 1) or end - begin == stride


@given(length=st.integers(1, 40), context=st.integers(1, 12))
def test_disjoint_windows_are_the_harness(length: int, context: int) -> None:
    """lm-evaluation-harness cuts the text, and gives each piece the context before its last."""
    found = list(spans(1 + length, 1, context, context))
    ids = list(range(1 + length))  # 0 is the prefix, the text is the rest
    pieces = [ids[i : i + context] for i in range(1, 1 + length, context)]
    assert [ids[begin:end] for _, begin, end in found] == pieces
    for (start, _, end), piece in zip(found, pieces, strict=True):
        before_last = ids[: piece[-1]]
        assert ids[start : end - 1] == before_last[-context:]


@given(text=texts, seed=seeds, stride=st.integers(0, 14))
@settings(max_examples=25)
def test_one_window_is_the_oracles_cross_entropy(text: str, seed: int, stride: int) -> None:
    params = random_params(CONFIG, seed)
    model = torch_model(CONFIG, params)
    found = evaluate(model, Letters(), [text], context=14, stride=stride)
    expected = oracle_loss(params, [BOS, *map(ord, text)])
    assert found.nats == pytest.approx(expected, rel=1e-10)
    assert found.tokens == len(text)
    assert found.perplexity == pytest.approx(math.exp(expected / len(text)), rel=1e-10)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / len(text), rel=1e-10)


@given(text=texts, window=windows(), seed=seeds)
@example(text="\x01\x02\x03\x04\x05\x06\x07", window=(4, 2), seed=0)
@settings(max_examples=20)
def test_each_token_is_scored_in_its_own_window(
    text: str, window: tuple[int, int], seed: int
) -> None:
    params = random_params(CONFIG, seed)
    ids = [BOS, *map(ord, text)]
    model = torch_model(CONFIG, params)
    context, stride = window
    found = evaluate(model, Letters(), [text], context=context, stride=stride)
    expected = [token_loss(params, ids, at, window) for at in range(1, len(ids))]
    assert found.nats == pytest.approx(math.fsum(expected), rel=1e-10)
    for start, begin, end in spans(len(ids), 1, context, stride):
        tokens, targets = torch.tensor(ids[start : end - 1]), torch.tensor(ids[start + 1 : end])
        targets[: begin - start - 1] = IGNORE_INDEX
        loss = perplexity.nll(model, tokens[None], targets[None])
        assert loss == pytest.approx(math.fsum(expected[begin - 1 : end - 1]), rel=1e-10)


@given(
    documents=st.lists(texts, min_size=1, max_size=6),
    window=windows(),
    batch_size=st.integers(1, 9),
    seed=seeds,
)
@settings(max_examples=25)
def test_documents_are_scored_alone_whatever_the_batch(
    documents: list[str], window: tuple[int, int], batch_size: int, seed: int
) -> None:
    model = torch_model(CONFIG, random_params(CONFIG, seed))
    context, stride = window

    def measure(texts: list[str], batch_size: int) -> Measurement:
        return evaluate(
            model, Letters(), texts, context=context, stride=stride, batch_size=batch_size
        )

    together = measure(documents, batch_size)
    alone = [measure([text], 1) for text in documents]
    assert together.nats == pytest.approx(math.fsum(one.nats for one in alone), rel=1e-10)
    assert together.tokens == sum(map(len, documents))
    assert together.documents == len(documents)


def test_more_windows_than_one_pool_holds() -> None:
    model = torch_model(CONFIG, random_params(CONFIG, 0))
    text = "\x03\x14\x15\x09\x02\x06\x05" * 30
    few, many = (
        evaluate(model, Letters(), [text] * 2, context=8, stride=1, batch_size=size)
        for size in (1, 500)
    )
    assert few.tokens == many.tokens == 2 * len(text) > perplexity.POOL_BATCHES
    assert few.nats == pytest.approx(many.nats, rel=1e-10)


def test_a_pass_holds_one_batch_and_the_logits_of_what_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, positions = [], []

    def nll(model: Llama, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        rows.append(len(tokens))
        return scored_nll(model, tokens, targets)

    def loss_sum(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        positions.append(hidden.shape[:2].numel())
        return torch.zeros(())

    scored_nll = perplexity.nll
    monkeypatch.setattr(perplexity, "nll", nll)
    monkeypatch.setattr(perplexity, "loss_sum", loss_sum)
    model = torch_model(CONFIG, random_params(CONFIG, 0))
    evaluate(model, Letters(), ["\x01" * 16], context=8, stride=2, batch_size=3)
    assert rows == [3, 2]  # of ids 1 to 8, then 9 and 10, 11 and 12, ...
    assert positions == [8 + 2 + 2, 2 + 2]


@pytest.mark.parametrize(
    ("prefix", "bos", "eos", "before"),
    [
        ((25, 26), "<s>", "<c>", [25, 26]),
        ((), "<s>", "<c>", [BOS]),
        ((), None, "<c>", [27]),
        ((), None, None, []),
    ],
)
def test_the_ids_before_a_document(
    prefix: tuple[int, ...], bos: str | None, eos: str | None, before: list[int]
) -> None:
    tokenizer = Letters(prefix)
    tokenizer.bos, tokenizer.eos = bos, eos
    params = random_params(CONFIG, 0)
    text = "\x05\x06\x07\x08"
    found = evaluate(torch_model(CONFIG, params), tokenizer, [text])
    ids = [*before, *map(ord, text)]
    unscored = oracle_loss(params, before) if len(before) > 1 else 0
    assert found.nats == pytest.approx(oracle_loss(params, ids) - unscored, rel=1e-10)
    assert (found.tokens, found.bytes) == (4 if before else 3, 4)
    assert found.before == tuple(before)


@pytest.fixture(scope="module")
def uniform() -> Llama:
    """A model that gives every token the same probability."""
    model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=12))
    model.init_weights(torch.Generator().manual_seed(0))
    model.model.embed_tokens.weight.data.zero_()
    return model.eval()


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(uniform: Llama) -> None:
    found = evaluate(uniform, Gpt2(), ["To be, or not to be: that is the question. " * 5])
    assert found.perplexity == pytest.approx(50257, rel=1e-6)
    assert (found.context, found.stride) == (12, 6)


def test_bytes_are_not_characters(uniform: Llama) -> None:
    text = "naïve 漢字 🙂"
    found = evaluate(uniform, Gpt2(), ["", text, text])
    assert (found.bytes, found.documents) == (2 * len(text.encode()), 2)
    assert found.tokens == 2 * len(Gpt2().encode(text))
    bits = found.tokens * math.log2(50257)
    assert found.bits_per_byte == pytest.approx(bits / found.bytes, rel=1e-6)


def test_half_of_a_surrogate_pair_is_no_text(uniform: Llama) -> None:
    with pytest.raises(InputError, match="^--data: document 2 is not valid text; correct it$"):
        evaluate(uniform, Gpt2(), ["a b", "a \ud83d b"])


def test_a_context_of_one_token_has_a_stride_of_one(uniform: Llama) -> None:
    assert evaluate(uniform, Gpt2(), ["a b c"], context=1).stride == 1


def test_a_window_of_the_whole_context_and_a_text_of_one_token(uniform: Llama) -> None:
    """The largest window and the shortest text that are accepted; seconds is part of the time."""
    before = time.perf_counter()
    found = evaluate(uniform, Gpt2(), ["a"], context=12, stride=12)
    assert 0 < found.seconds <= time.perf_counter() - before
    assert (found.tokens, found.context, found.stride) == (1, 12, 12)
    assert found.nats == pytest.approx(math.log(50257), rel=1e-6)
    for windows, flag in (((13, 6), "--context 13"), ((11, 12), "--stride 12")):
        with pytest.raises(InputError, match=f"^{flag} is more than"):
            evaluate(uniform, Gpt2(), ["a"], *windows)


def test_an_absurd_loss_has_a_perplexity() -> None:
    assert Measurement(1, 1, (), tokens=1, nats=1e6).perplexity == math.exp(700)


def test_a_broken_model_says_so() -> None:
    params = random_params(CONFIG, 0)
    params["model.norm.weight"][0] = math.nan
    with pytest.raises(InputError, match="the loss is nan.*compare.py"):
        evaluate(torch_model(CONFIG, params), Letters(), ["\x01\x02"])


def test_a_batch_that_no_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that a forward pass has at one time: keys, values and a block's hidden vectors."""
    model = torch_model(CONFIG, random_params(CONFIG, 0))
    needed = 5 * 40 * model.head_weight.itemsize * (2 * 2 * 1 * 6 + 2 * 16)
    monkeypatch.setattr(perplexity, "total_memory", lambda device: needed)
    perplexity.require_batch_memory(model, 5, 40)
    with pytest.raises(InputError, match=r"--batch-size: 6 windows of 40 tokens take at least"):
        perplexity.require_batch_memory(model, 6, 40)
    monkeypatch.setattr(perplexity, "total_memory", lambda device: 0)
    with pytest.raises(InputError, match=r"use fewer, or a smaller --context"):
        evaluate(model, Letters(), ["abc"], 4, 2)
