"""Labels and packed conversations, held to the oracle's: targets, loss and every gradient."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.data.packing import EMPTY, PackedSampler, pack
from llama_torch.model.loss import IGNORE_INDEX, backward_loss, loss_sum
from llama_torch.tokenizer.answers import Segment
from llama_torch.training import step, validate
from llama_torch.training.labels import Examples, PackedWindows, cut_to, labels, packed_batch
from reference_np.config import LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.ops import IGNORE
from reference_np.sft import sft_labels
from reference_np.tolerances import FLOAT64_TOLERANCE

from ..backends.torch_model import torch_model
from ..conformance.architectures import configs, seeds
from ..conformance.drawn import Draw, composite, describe_case
from ..conformance.strategies import Params, random_params
from ..conformance.training_cases import max_abs

CONTEXT = 12


def segments_of(draw: Any, vocab_size: int, most: int = CONTEXT) -> list[Segment]:
    """Draw a conversation of prompts and answers that fits ``most`` positions."""
    ids = st.integers(0, vocab_size - 1)
    found: list[Segment] = []
    for _ in range(draw(st.integers(1, 2))):
        prompt, answer = (
            st.lists(ids, min_size=1, max_size=3),
            st.lists(ids, min_size=1, max_size=3),
        )
        found += [Segment(draw(prompt), False), Segment(draw(answer), True)]
    return found


segments = st.composite(lambda draw: segments_of(draw, 50))()
anything = st.lists(
    st.builds(Segment, st.lists(st.integers(0, 9), max_size=4), st.booleans()), min_size=1
).filter(lambda given: any(segment.ids for segment in given))


@given(given=segments | anything)
def test_labels_are_the_oracles(given: list[Segment]) -> None:
    tokens, targets = labels(given)
    expected = sft_labels(given)
    assert IGNORE == IGNORE_INDEX
    assert tokens.tolist() == expected[0].tolist()
    assert targets.tolist() == expected[1].tolist()


class Packed(NamedTuple):
    """A model and conversations in windows."""

    config: LlamaConfig
    params: Params  # float64
    conversations: list[list[Segment]]
    numbers: Mapping[str, Any]  # what it was made from

    def __repr__(self) -> str:
        """Return the labelled draws in place of the arrays."""
        return describe_case(self)


@composite
def packed_cases(draw: Draw) -> Packed:
    config = draw(configs())
    rng = np.random.default_rng(draw(seeds, label="tokens seed"))
    found = []
    for _ in range(draw(st.integers(1, 5), label="conversations")):
        sizes = rng.integers(1, 4, 2 * rng.integers(1, 3))
        ids = [rng.integers(0, config.vocab_size, size).tolist() for size in sizes]
        found.append([Segment(one, bool(i % 2)) for i, one in enumerate(ids)])
    params = random_params(config, draw(seeds, label="weights seed"))
    return Packed(config, params, found, draw.numbers)


@pytest.mark.numeric
@given(case=packed_cases())
def test_packed_conversations_are_each_alone(case: Packed) -> None:
    """The loss of a step, in one micro-batch or one a window, by the oracle's of each alone."""
    batches = [Batch(*(part[None] for part in sft_labels(one))) for one in case.conversations]
    n_learnt = sum(int(np.sum(batch.targets != IGNORE)) for batch in batches)
    expected, loss = {name: np.zeros_like(value) for name, value in case.params.items()}, 0.0
    for batch in batches:
        share, grads = loss_and_grads(case.params, batch, case.config, n_valid=n_learnt)
        loss += share
        expected = {name: expected[name] + grads[name] for name in expected}
    model = torch_model(case.config, case.params).train().requires_grad_(True)
    windows = PackedWindows(Examples.of(case.conversations), CONTEXT)
    rows = torch.stack([windows[i] for i in [*range(len(windows)), EMPTY]])
    known = 1e-3  # a probability next to one is known to a rounding of one
    largest = max(map(max_abs, expected.values()))
    for parts in ([rows], [*rows.split(1)]):
        for parameter in model.parameters():
            parameter.grad = None
        found, grads_of = step.accumulate(model, [packed_batch(part) for part in parts])
        limit = FLOAT64_TOLERANCE
        assert found.item() == pytest.approx(loss, rel=limit, abs=limit * known)
        for name, parameter in model.named_parameters():
            scale = max(max_abs(expected[name]), 1e-3 * largest, known)
            assert max_abs(grads_of[parameter].numpy() - expected[name]) <= limit * scale, name
    val_loss = validate.validation_loss(model, [rows], packed_batch)
    assert val_loss == pytest.approx(loss, rel=limit, abs=limit * known)


@pytest.mark.numeric
def test_what_sees_another_conversation_is_told() -> None:
    """The same windows without the document mask have another loss."""
    config = LlamaConfig(8, 1, 2, 2, 4, 8, 20, 16)
    model = torch_model(config, random_params(config, 3))
    given = [
        [Segment([1, 2], False), Segment([3], True)],
        [Segment([4], False), Segment([5], True)],
    ]
    windows = PackedWindows(Examples.of(given), CONTEXT)
    rows = torch.stack([windows[0]])
    packed = validate.validation_loss(model, [rows], packed_batch)
    leaky = validate.validation_loss(
        model, [rows], lambda rows: packed_batch(rows)._replace(mask=None, positions=None)
    )
    assert abs(packed - leaky) > 1e-6


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    rows=st.integers(1, 3),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 3),
)
def test_every_conversation_is_read_once_an_epoch(
    lengths: list[int], rows: int, seed: int, epochs: int
) -> None:
    windows = pack(lengths, 20)
    assert all(sum(lengths[i] for i in window) <= 20 for window in windows)
    # Of two windows none could be poured into the other, or the second had not been opened.
    fills = sorted(sum(lengths[i] for i in window) for window in windows)
    assert len(fills) == 1 or fills[0] + fills[1] > 20
    world, n_read = 2, epochs * len(windows)
    last = -(-n_read // (rows * world))
    given = len(windows), n_read, seed, rows * world
    samplers = [PackedSampler(*given, 0, last, rank, world) for rank in range(world)]
    read: list[int] = []
    for parts in zip(*samplers, strict=True):
        assert len({len(part) for part in parts}) == 1  # a collective call for a collective call
        read += [number for part in parts for number in part if number != EMPTY]
    alone = [n for part in PackedSampler(*given, 0, last) for n in part]
    assert read == alone
    assert len(read) == n_read  # the last step has what is left of the epochs, and no more
    for epoch in range(epochs):
        of_it = read[epoch * len(windows) : (epoch + 1) * len(windows)]
        assert Counter(i for window in of_it for i in windows[window]) == Counter(
            range(len(lengths))
        )


def test_a_long_conversation_is_cut_after_the_last_answer_that_fits() -> None:
    given = [Segment([1, 2], False), Segment([3, 4], True), Segment([5], False)]
    given += [Segment([6, 7], True), Segment([8], False)]
    assert cut_to(given, 7) == given[:4]
    assert cut_to(given, 6) == given[:4]  # seven tokens: the last one is predicted, not read
    assert cut_to(given, 5) == given[:2]
    assert cut_to(given, 3) == given[:2]
    assert cut_to(given, 2) == []


@pytest.mark.numeric
@given(
    rows=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=seeds,
)
def test_what_is_not_learnt_has_no_logits_and_no_gradient(
    rows: int, share: float, z_loss: float, seed: int
) -> None:
    """Hidden states of unlearnt positions are NaN: neither loss nor any gradient knows of them."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    hidden = torch.randn(rows, 5, 4, dtype=torch.float64, generator=generator)
    head = torch.randn(11, 4, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(11, (rows, 5), generator=generator)
    is_learnt = torch.rand(rows, 5, generator=generator) < share
    targets = targets.masked_fill(~is_learnt, IGNORE_INDEX)
    alone = hidden[is_learnt].requires_grad_()
    logits = alone @ head.T
    terms = logits.logsumexp(-1) - logits.gather(1, targets[is_learnt][:, None]).squeeze(1)
    expected = (terms + z_loss * logits.logsumexp(-1).square()).sum() / 7
    expected.backward()
    assert head.grad is not None
    known, head.grad = head.grad, None
    given = hidden.masked_fill(~is_learnt[..., None], float("nan")).requires_grad_()
    found = backward_loss(given * 1, head, targets, 7, z_loss)
    torch.testing.assert_close(found, expected.detach())
    assert alone.grad is not None
    assert given.grad is not None
    torch.testing.assert_close(given.grad[is_learnt], alone.grad)
    assert (given.grad[~is_learnt] == 0).all()
    torch.testing.assert_close(head.grad, known)
    torch.testing.assert_close(loss_sum(given, head, targets, z_loss) / 7, expected)
