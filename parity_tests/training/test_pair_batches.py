"""Micro-batches of pairs have little padding, and few widths where each is compiled."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.finetuning_config import RewardConfig
from llama_torch.model.config import ModelConfig
from llama_torch.model.reward import RewardModel
from llama_torch.training import conversation_loading, pair_loading
from llama_torch.training.memory import Layout, step_needs
from llama_torch.training.pair_loading import LoadedPairs, Pairs
from llama_torch.training.pair_source import (
    PairSource,
    PairWindows,
    least_padded_widths,
    pair_batch,
)

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)


def pairs_of(longest: list[int]) -> Pairs:
    """Return pairs whose chosen answers have those lengths; the rejected ones have one token."""
    rows = [n for length in longest for n in (length, 1)]
    starts = np.cumsum([0, *rows])
    columns = np.zeros((len(rows), 3), np.int64)
    return Pairs(np.ones(starts[-1], np.int32), starts, columns, [""] * len(longest))


def padded(longest: list[int], widths: tuple[int, ...]) -> int:
    return sum(min((w for w in widths if w >= n), default=10**9) for n in longest)


@given(longest=lengths, most=st.integers(1, 4))
def test_no_other_widths_have_less_padding(longest: list[int], most: int) -> None:
    found = least_padded_widths(np.array(longest), most)
    assert len(found) <= most
    assert found == sorted(found)
    every = sorted({-(-n // 8) * 8 for n in longest})
    others = [c for k in range(1, most + 1) for c in combinations(every, k)]
    assert padded(longest, tuple(found)) == min(padded(longest, other) for other in others)


def test_many_lengths_have_widths_in_no_time() -> None:
    longest = np.exp(np.random.default_rng(0).uniform(np.log(16), np.log(4096), 200_000))
    found = least_padded_widths(longest.astype(int))
    assert len(found) == 4
    assert found[-1] == 4096
    assert padded([*longest.astype(int)[:2000]], tuple(found)) < 1.6 * longest[:2000].sum()


def windows_of(longest: list[int]) -> torch.Tensor:
    windows = PairWindows(pairs_of(longest))
    return torch.stack([windows[i] for i in range(len(windows))])


def test_short_pairs_are_hardly_padded_on_a_cpu() -> None:
    """One long pair among the data made every micro-batch a quarter of its length wide."""
    windows = windows_of([1000, 20, 17])
    assert pair_batch(windows[1:]).tokens.shape == (4, 24)
    assert pair_batch(windows[1:], (64, 1000)).tokens.shape == (4, 64)
    assert pair_batch(windows, (64, 1000)).tokens.shape == (6, 1000)


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [("auto", "cpu", []), ("no", "cpu", []), ("yes", "cpu", [16, 24, 504])],
)
def test_widths_are_few_where_blocks_are_compiled(
    mode: str, device: str, expected: list[int]
) -> None:
    config = RewardConfig(compile=mode, device=device)  # type: ignore[arg-type]
    loaded = LoadedPairs(pairs_of([9, 16, 20]), pairs_of([500]), [], {})
    source = PairSource(config, loaded)
    assert [*source.widths] == expected
    assert source.to_batch(windows_of([9, 16])).tokens.shape == (4, 16)


def test_a_reward_model_needs_no_memory_for_a_vocabulary_head_or_a_full_context() -> None:
    """Both made a run be refused that fits: rows are as long as their conversations."""
    model = ModelConfig(16, 3, 4, 2, 4, 24, 6000, 4096, tie_embeddings=False)
    needs = step_needs(RewardConfig(model=model, dtype="float32"), Layout())
    n_parameters = sum(p.numel() for p in RewardModel(model).parameters())
    weights = sum(need.n_bytes for need in needs if need.kind == "weights")
    assert weights == 4 * n_parameters
    assert sum(need.n_bytes for need in needs) == 16 * n_parameters


@pytest.mark.parametrize("module", [pair_loading, conversation_loading])
def test_a_long_reading_is_not_silent(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_torch.common import reading

    assert module.told is reading.told  # type: ignore[attr-defined]
    assert [*reading.told(iter("ab"), "letters read")] == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reading, "FIRST_LINE", 0.0)
    monkeypatch.setattr(reading, "BETWEEN_LINES", 0.0)
    assert [*reading.told("ab", "letters read")] == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["letters read: 1 of 2 (0 s)", "letters read: 2 of 2 (0 s)"]
    assert [*reading.told(iter("a"), "letters read")] == ["a"]
    assert capsys.readouterr().err == "letters read: 1 (0 s)\n"
