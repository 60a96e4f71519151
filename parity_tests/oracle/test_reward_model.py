"""The oracle's training step of a reward model: its gradients, its padding, its micro-batches."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from reference_np.checkpoint import RewardCheckpoint
from reference_np.config import InputError, LlamaConfig
from reference_np.naming import LM_HEAD, SCORE
from reference_np.ops import IGNORE, Array
from reference_np.reward_model import PairBatch, RewardStep, loss_and_grads

from ..conformance.strategies import random_params

CONFIG = LlamaConfig(8, 2, 2, 1, 4, 12, 20, max_seq_len=16)
TOLERANCE = 1e-10


def parameters(seed: int = 0) -> dict[str, Array]:
    """Return a random trunk and scalar head, in float64."""
    params = {n: x.astype(np.float64) for n, x in random_params(CONFIG, seed).items()}
    params[SCORE] = params.pop(LM_HEAD)[:1]
    return params


PARAMS = parameters()


def batch(seed: int, n_pairs: int, layout: str = "right", spare: int = 0) -> PairBatch:
    """Return pairs of one seed in a layout, with other tokens in the padding."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 20, n) for n in rng.integers(1, 6, 2 * n_pairs)]
    margins, labels = rng.integers(0, 4, n_pairs) / 2, rng.integers(-1, 2, 2 * n_pairs)
    width = 5 + spare
    tokens = np.random.default_rng(spare).integers(0, 20, (2 * n_pairs, width))
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if layout == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = row, True
    return PairBatch(tokens, mask, margins, np.where(labels < 0, IGNORE, labels))


def require_equal(found: RewardStep, expected: RewardStep) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    scores = (np.concatenate(step.scores) for step in (found, expected))
    np.testing.assert_allclose(*scores, rtol=TOLERANCE, atol=TOLERANCE)
    for name, value in expected.grads.items():
        np.testing.assert_allclose(found.grads[name], value, rtol=TOLERANCE, atol=TOLERANCE)


def loss_at(params: Mapping[str, Array], batches: list[PairBatch]) -> float:
    return loss_and_grads(params, batches, CONFIG, 0.5).loss


@pytest.mark.parametrize("layout", ["left", "right"])
def test_gradients_are_those_of_differences(layout: str) -> None:
    batches = [batch(1, 2, layout, 1), batch(2, 1, layout)]
    grads = loss_and_grads(PARAMS, batches, CONFIG, 0.5).grads
    assert grads.keys() == PARAMS.keys()
    rng, step = np.random.default_rng(0), 1e-5
    for name, value in PARAMS.items():
        assert grads[name].shape == value.shape
        direction = rng.standard_normal(value.shape)
        ahead, behind = ({**PARAMS, name: value + s * step * direction} for s in (1, -1))
        slope = (loss_at(ahead, batches) - loss_at(behind, batches)) / (2 * step)
        assert np.sum(grads[name] * direction) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@given(seed=st.integers(0, 99), n_pairs=st.integers(1, 3), spare=st.integers(0, 3))
def test_padding_changes_nothing_on_either_side(seed: int, n_pairs: int, spare: int) -> None:
    expected = loss_and_grads(PARAMS, [batch(seed, n_pairs)], CONFIG, 0.5)
    for layout in ("left", "right"):
        padded = batch(seed, n_pairs, layout, spare)
        require_equal(loss_and_grads(PARAMS, [padded], CONFIG, 0.5), expected)


def test_micro_batches_add_up() -> None:
    whole = batch(3, 3)
    cut = [
        PairBatch(*(x[a * n : b * n] for x, n in zip(whole, (2, 2, 1, 2), strict=True)))
        for a, b in ((0, 1), (1, 3))
    ]
    found, expected = (loss_and_grads(PARAMS, x, CONFIG, 0.5) for x in (cut, [whole]))
    require_equal(found, expected)


def test_a_step_without_a_pair_is_refused() -> None:
    with pytest.raises(InputError, match="without a single pair"):
        loss_and_grads(PARAMS, [], CONFIG)


def written(tmp_path: Path, params: Mapping[str, Array]) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {name: np.ascontiguousarray(x) for name, x in params.items()}
    save_file(tensors, path, {"config": CONFIG.to_json()})
    return path


def test_a_reward_model_is_read_from_its_file(tmp_path: Path) -> None:
    found = RewardCheckpoint(written(tmp_path, PARAMS), np.float64)
    assert {*found} == {*PARAMS}
    for name, value in PARAMS.items():
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({SCORE: None}, f"is no reward model, which has a head {SCORE}"),
        ({SCORE: np.ones((2, 8))}, rf"{SCORE} is \[2, 8\] and should be \[1, 8\]"),
        ({LM_HEAD: np.ones((20, 8))}, f"{LM_HEAD} is not a parameter of it"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ],
)
def test_another_model_is_refused(
    change: Mapping[str, Array | None], says: str, tmp_path: Path
) -> None:
    params = {n: x for n, x in {**PARAMS, **change}.items() if x is not None}
    with pytest.raises(InputError, match=says):
        RewardCheckpoint(written(tmp_path, params))
