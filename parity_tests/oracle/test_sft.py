"""Which tokens are learnt, and their loss, however a batch is put together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import sft
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.ops import IGNORE, Array, cross_entropy_sum

from ..conformance.architectures import configs, seeds
from ..conformance.strategies import padded, random_params
from ..support.fine_tuning import (
    DIFFERENCES,
    VOCAB,
    agree,
    conversations,
    gradient_error,
    pad_rows,
    segments,
)

pytestmark = pytest.mark.numeric

Talk = list[tuple[list[int], bool]]
END = 2  # also the padding's id
TWO_TURNS = [([1, 5, 6], False), ([4, END], True), ([5, 3], False), ([6, 6, END], True)]


def test_answers_and_their_end_tokens_are_learnt_and_nothing_else() -> None:
    tokens, targets = sft.sft_labels(TWO_TURNS)
    assert tokens.tolist() == [1, 5, 6, 4, END, 5, 3, 6, 6, END]
    _ = IGNORE
    assert targets.tolist() == [_, _, 4, END, _, _, 6, 6, END, _]
    assert tokens.dtype == targets.dtype == np.int64


@given(own=segments)
def test_a_target_is_the_next_token_where_that_is_learnt(own: Talk) -> None:
    tokens, targets = sft.sft_labels(own)
    flat = [(i, learnt) for ids, learnt in own for i in ids]
    assert tokens.tolist() == [i for i, _ in flat]
    assert targets.tolist() == [i if learnt else IGNORE for i, learnt in flat[1:]] + [IGNORE] * (
        len(flat) > 0
    )


@given(own=segments, other=st.integers(0, VOCAB - 1))
def test_what_is_learnt_depends_on_the_place_not_the_id(own: Talk, other: int) -> None:
    same = [([other] * len(ids), learnt) for ids, learnt in own]
    assert ((sft.sft_labels(own)[1] != IGNORE) == (sft.sft_labels(same)[1] != IGNORE)).all()


@given(turns=st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=1, max_size=4))
def test_a_ghost_attention_dialogue_has_its_instruction_once_and_learns_its_last_answer(
    turns: list[tuple[str, str]],
) -> None:
    found = sft.gatt_dialogue("Always: ", turns)
    assert [learnt for _, learnt in found] == [False] * (2 * len(turns) - 1) + [True]
    plain = [message for turn in turns for message in turn]
    assert [message for message, _ in found] == ["Always: " + plain[0], *plain[1:]]
    ids = sft.gatt_dialogue((9,), [(tuple(map(ord, u)), tuple(map(ord, a))) for u, a in turns])
    targets = sft.sft_labels(ids)[1]
    assert (targets != IGNORE).sum() == len(turns[-1][1])


def drawn_logits(seed: int, targets: Array) -> Array:
    return 3 * np.random.default_rng(seed).standard_normal((*targets.shape, VOCAB))


@given(
    talks=conversations, seed=seeds, left=st.booleans(), filler=st.sampled_from([np.nan, np.inf])
)
def test_the_loss_is_the_same_padded_split_and_with_anything_where_nothing_is_learnt(
    talks: list[Talk], seed: int, left: bool, filler: float
) -> None:
    rows = [sft.sft_labels(own)[1] for own in talks]
    logits = [drawn_logits(seed + i, row) for i, row in enumerate(rows)]
    count = max(1, sum(int((row != IGNORE).sum()) for row in rows))
    losses = [sft.token_loss(x[None], t[None], count) for x, t in zip(logits, rows, strict=True)]
    grads = [
        sft.token_loss_vjp(x[None], t[None], count)[0] for x, t in zip(logits, rows, strict=True)
    ]
    targets = pad_rows(rows, IGNORE, left, extra=1)
    whole = pad_rows(logits, filler, left, extra=1)
    whole[targets == IGNORE] = filler
    assert agree(sft.token_loss(whole, targets, count), sum(losses))
    assert agree(sft.token_loss_vjp(whole, targets, count), pad_rows(grads, 0.0, left, extra=1))
    expected = sum(
        float(cross_entropy_sum(x[None], t[None])) for x, t in zip(logits, rows, strict=True)
    )
    assert agree(sum(losses), expected / count)


@given(own=segments, seed=seeds)
def test_the_losss_gradient_against_differences(own: Talk, seed: int) -> None:
    targets = sft.sft_labels([*own, ([1, 3], True)])[1][None]
    x = drawn_logits(seed, targets)
    found = sft.token_loss_vjp(x, targets, 3)
    assert gradient_error(lambda x: sft.token_loss(x, targets, 3), x, found) <= DIFFERENCES


@given(config=configs(), talks=conversations, seed=seeds)
def test_a_model_learns_the_same_from_packed_padded_and_single_conversations(
    config: LlamaConfig, talks: list[Talk], seed: int
) -> None:
    config = replace(config, vocab_size=VOCAB)
    params = random_params(config, seed)
    labelled = [sft.sft_labels(own) for own in talks]
    count = max(1, sum(int((targets != IGNORE).sum()) for _, targets in labelled))
    batches = [Batch(tokens[None], targets[None]) for tokens, targets in labelled]
    single = [loss_and_grads(params, batch, config, n_valid=count) for batch in batches]
    for together in (
        sft.pack(labelled),
        padded_batch(labelled, True),
        padded_batch(labelled, False),
    ):
        loss, grads = loss_and_grads(params, together, config, n_valid=count)
        assert agree(loss, sum(one for one, _ in single))
        for name, grad in grads.items():
            assert agree(grad, np.sum([own[name] for _, own in single], axis=0)), name


def padded_batch(labelled: list[tuple[Array, Array]], left: bool) -> Batch:
    positions, mask, _ = padded([len(tokens) for tokens, _ in labelled], left)
    tokens, targets = (
        pad_rows(rows, filler, left)
        for rows, filler in zip(zip(*labelled, strict=True), (END, IGNORE), strict=True)
    )
    return Batch(tokens, targets, positions, mask)


def test_a_step_without_a_learnt_token_is_refused_and_a_part_of_one_is_not() -> None:
    targets = np.full((2, 3), IGNORE)
    logits = drawn_logits(0, targets)
    for function in (sft.token_loss, sft.token_loss_vjp):
        with pytest.raises(InputError, match="count: 0"):
            function(logits, targets, 0)
    assert sft.token_loss(logits, targets, 5) == 0.0
    assert not sft.token_loss_vjp(logits, targets, 5).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_loss_keeps_its_inputs_and_their_precision(dtype: type) -> None:
    targets = sft.sft_labels(TWO_TURNS)[1][None]
    logits = drawn_logits(0, targets).astype(dtype)
    logits.flags.writeable = targets.flags.writeable = False
    assert sft.token_loss_vjp(logits, targets, 4).dtype == dtype
    assert sft.token_loss(logits, targets, 4) > 0
