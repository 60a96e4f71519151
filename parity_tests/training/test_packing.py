"""Packed rows give the sum of their documents' losses and gradients, by the oracle's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.training import step, validate
from llama_torch.training.batch import pack_documents, to_batch
from reference_np.config import LlamaConfig
from reference_np.grad import Batch, loss_and_grads
from reference_np.ops import IGNORE
from reference_np.tolerances import FLOAT64_TOLERANCE

from ..backends.torch_model import torch_model
from ..conformance.architectures import configs, seeds
from ..conformance.drawn import Draw, composite, describe_case
from ..conformance.strategies import Array, Params, random_params
from ..conformance.training_cases import max_abs
from ..support.devices import on_every_device

pytestmark = pytest.mark.numeric


class Packed(NamedTuple):
    """A model and windows [B, T + 1] in which the highest id ends a document."""

    config: LlamaConfig
    params: Params  # float64
    window: Array
    end: int
    numbers: Mapping[str, Any]  # what it was made from

    def __repr__(self) -> str:
        """Return the labelled draws in place of the arrays."""
        return describe_case(self)


@composite
def packed_cases(draw: Draw) -> Packed:
    config = draw(configs())
    rng = np.random.default_rng(draw(seeds, label="tokens seed"))
    shape = draw(st.integers(1, 3), label="rows"), draw(st.integers(3, 14), label="T + 1")
    window, end = rng.integers(0, config.vocab_size - 1, shape), config.vocab_size - 1
    window[rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.5]), label="ends")] = end
    window[0, :2] = 0  # at least one target counts
    params = random_params(config, draw(seeds, label="weights seed"))
    return Packed(config, params, window, end, draw.numbers)


def documents_of(case: Packed) -> list[Batch]:
    """Return every document, or the part of it within a row, as a batch of its own."""
    found = []
    for row in case.window:
        begin = 0
        for i in range(len(row) - 1):
            ends = row[i] == case.end
            if ends or i == len(row) - 2:
                tokens, targets = row[begin : i + 1], row[begin + 1 : i + 2].copy()
                if ends:
                    targets[-1] = IGNORE  # it is of the next document
                found.append(Batch(tokens[None], targets[None]))
                begin = i + 1
    return found


@on_every_device
@given(case=packed_cases())
def test_a_packed_row_is_its_documents_alone(device: str, case: Packed) -> None:
    """Loss and every gradient, against the sum of the oracle's of each document alone."""
    documents = documents_of(case)
    n_valid = sum(int(np.sum(batch.targets != IGNORE)) for batch in documents)
    expected, loss = {name: np.zeros_like(value) for name, value in case.params.items()}, 0.0
    for batch in documents:
        share, grads = loss_and_grads(case.params, batch, case.config, n_valid=n_valid)
        loss += share
        expected = {name: expected[name] + grads[name] for name in expected}
    model = torch_model(case.config, case.params).to(device).train().requires_grad_(True)
    packed = pack_documents(torch.from_numpy(case.window), case.end)
    found, grads_of = step.accumulate(model, [packed])
    # A probability next to one is known to a rounding of one, however little it leaves to learn.
    known = 1e-3
    assert found.item() == pytest.approx(loss, rel=FLOAT64_TOLERANCE, abs=FLOAT64_TOLERANCE * known)
    largest = max(map(max_abs, expected.values()))
    for name, parameter in model.named_parameters():
        scale = max(max_abs(expected[name]), 1e-3 * largest, known)
        wrong = max_abs(grads_of[parameter].cpu().numpy() - expected[name])
        assert wrong <= FLOAT64_TOLERANCE * scale, name
    windows = [torch.from_numpy(case.window)]
    val_loss = validate.validation_loss(
        model, windows, lambda window: pack_documents(window, case.end)
    )
    assert val_loss == pytest.approx(loss, rel=FLOAT64_TOLERANCE, abs=FLOAT64_TOLERANCE * known)


def test_what_is_packed() -> None:
    packed = pack_documents(torch.tensor([[5, 9, 6, 7, 9, 9, 8]]), eos_id=9)
    assert packed.tokens.tolist() == [[5, 9, 6, 7, 9, 9]]
    assert packed.targets.tolist() == [[9, IGNORE, 7, 9, IGNORE, IGNORE]]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    mask = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    mask += [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert packed.dense_mask.int().tolist() == [mask]
    assert packed.mask.starts.tolist() == [0, 2, 5, 6, 6, 6, 6]
    assert packed.mask.sizes.tolist() == [3, 3]


def test_without_an_end_packing_is_the_plain_batch() -> None:
    window = torch.arange(20).view(2, 10)
    plain, packed = to_batch(window), pack_documents(window)
    assert torch.equal(plain.tokens, packed.tokens)
    assert torch.equal(plain.targets, packed.targets)
    assert packed.positions.tolist() == [list(range(9))] * 2
    assert torch.equal(packed.dense_mask, torch.ones(2, 9, 9, dtype=torch.bool).tril())
