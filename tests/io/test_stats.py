"""Goodput and its bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speckv_online.stats import bootstrap_goodput, goodput, paired_ratio

positive = st.floats(0.01, 100)
columns = st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(positive, min_size=n, max_size=n)] * 4))


def test_goodput_is_a_ratio_of_sums() -> None:
    # The mean of the per-prompt speeds would be (1 + 10) / 2.
    assert goodput([10, 10], [10, 1]) == pytest.approx(20 / 11)
    assert math.isnan(goodput([], []))


@settings(max_examples=40, deadline=None)
@given(columns)
def test_interval_holds_the_ratio_and_its_extremes_hold_the_interval(data: tuple[list[float], ...]) -> None:
    t, s, bt, bs = map(np.array, data)
    ratio = paired_ratio(t, s, bt, bs, resamples=500)
    assert ratio.value == pytest.approx(goodput(t, s) / goodput(bt, bs))
    # A ratio of sums never leaves the range that its parts span.
    low = (t / s).min() / (bt / bs).max()
    high = (t / s).max() / (bt / bs).min()
    assert low * (1 - 1e-9) <= ratio.low <= ratio.high <= high * (1 + 1e-9)
    assert 0 < ratio.p_value <= 1


@settings(max_examples=25, deadline=None)
@given(columns, st.floats(0.1, 10))
def test_ratio_scales_with_speed_and_inverts_with_its_sides(data: tuple[list[float], ...], factor: float) -> None:
    t, s, bt, bs = map(np.array, data)
    ratio = paired_ratio(t, s, bt, bs, resamples=400)
    faster = paired_ratio(t, s / factor, bt, bs, resamples=400)
    other = paired_ratio(bt, bs, t, s, resamples=400)
    assert faster.low == pytest.approx(factor * ratio.low)
    assert faster.high == pytest.approx(factor * ratio.high)
    assert other.value == pytest.approx(1 / ratio.value)
    assert other.p_value == pytest.approx(ratio.p_value)


def test_a_policy_against_itself_is_no_difference() -> None:
    t, s = np.arange(1.0, 8), np.linspace(0.3, 0.9, 7)
    ratio = paired_ratio(t, s, t, s)
    assert (ratio.value, ratio.low, ratio.high, ratio.p_value) == (1, 1, 1, 1)
    assert not ratio.above
    assert not ratio.below


def test_pairing_finds_a_difference_that_is_smaller_than_the_spread_between_prompts() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 20, 30)  # prompts differ twentyfold
    tokens = np.full(30, 40.0)
    ratio = paired_ratio(tokens, seconds / rng.normal(1.05, 0.01, 30), tokens, seconds)
    assert ratio.above
    assert ratio.p_value < 0.001
    unpaired = bootstrap_goodput(tokens, seconds)
    assert unpaired.high / unpaired.low > 1.2


def test_coverage_is_close_to_nominal() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(300):
        # Equal speeds but for noise: an interval should hold 1 about 95 times in 100.
        s, bs = rng.gamma(20, 0.05, (2, 40))
        ratio = paired_ratio(np.ones(40), s, np.ones(40), bs, resamples=600, seed=i)
        hits += ratio.low <= 1 <= ratio.high
    assert 0.90 <= hits / 300 <= 0.985


def test_seeds_repeat_and_many_prompts_fit_in_memory() -> None:
    rng = np.random.default_rng(2)
    t, s, bs = rng.uniform(1, 2, (3, 3000))
    first = paired_ratio(t, s, t, bs, resamples=3000, seed=7)
    assert first == paired_ratio(t, s, t, bs, resamples=3000, seed=7)
    assert first != paired_ratio(t, s, t, bs, resamples=3000, seed=8)


def test_one_prompt_has_no_interval() -> None:
    ratio = paired_ratio([10], [2], [10], [4])
    assert ratio.value == 2
    assert math.isnan(ratio.low)
    assert not ratio.above


@pytest.mark.parametrize(
    ("tokens", "seconds"), [([1, 2], [1]), ([], []), ([1, 0], [1, 1]), ([1, 1], [1, 0]), ([1, math.nan], [1, 1])]
)
def test_numbers_that_make_no_ratio_are_refused(tokens: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"prompt|vectors"):
        bootstrap_goodput(tokens, seconds)
