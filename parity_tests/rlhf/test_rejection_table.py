"""The estimates of the best of K are the means over all sets of K answers."""

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.rlhf.rejection_table import best_of, mean_of_maximum, mean_of_median, table

scores = st.lists(st.floats(-9, 9), min_size=1, max_size=9)


@given(scores=scores, data=st.data())
def test_the_estimates_are_means_over_all_sets(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    sets = [*itertools.combinations(scores, k)]
    assert mean_of_maximum(scores, k) == pytest.approx(statistics.mean(map(max, sets)), abs=1e-12)
    medians = [statistics.median(one) for one in sets]
    assert mean_of_median(scores, k) == pytest.approx(statistics.mean(medians), abs=1e-12)


def test_many_samples_have_weights_beyond_a_float() -> None:
    n = 5000
    assert mean_of_maximum([float(i) for i in range(1, n + 1)], 2500) == pytest.approx(
        2500 * (n + 1) / 2501  # of a uniform sample without replacement
    )


def test_the_rows_are_powers_of_two_and_all() -> None:
    given = [[3.0, 1.0, 2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0, 10.0]]
    rows = best_of(given)
    assert [row.samples for row in rows] == [1, 2, 4, 5]
    assert rows[0].maximum == rows[0].median == pytest.approx((3 + 10 / 6) / 2)
    assert rows[-1].maximum == pytest.approx((5 + 10 * 5 / 6) / 2)
    assert [row.samples for row in best_of([[1.0]])] == [1]
    assert [row.samples for row in best_of([[1.0] * 8])] == [1, 2, 4, 8]
    assert table(given)[1].split() == ["1", "2.333", "2.333"]
