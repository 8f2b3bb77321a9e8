"""The host's one-pass warpers against transformers' own, and draws against their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from speckv_online.modeling.sampling import Sampler
from speckv_online.modeling.warpers import BLOCK, Warpers, draw_from, is_usual

MARGIN = 1e-5


def theirs(chain: list[LogitsProcessor], scores: torch.Tensor) -> torch.Tensor:
    return LogitsProcessorList(chain)(None, scores[None])[0].softmax(-1)  # type: ignore[arg-type]


def far_from_the_edge(chain: list[LogitsProcessor], scores: torch.Tensor) -> bool:
    """Whether no cut hangs on the last bits: there transformers' own sums round one way or the other."""
    for i, warper in enumerate(chain):
        p = theirs(chain[:i], scores).double() if i else scores.double().softmax(-1)
        if isinstance(warper, TopPLogitsWarper):
            ordered = p.sort(descending=True).values
            found = (ordered.cumsum(-1) - warper.top_p).abs().min()
        elif isinstance(warper, MinPLogitsWarper):
            found = (p / p.max() - warper.min_p).abs().min()
        else:
            continue
        if found < MARGIN:
            return False
    return True


WARPERS = st.one_of(
    st.floats(0.1, 3.0).map(TemperatureLogitsWarper),
    st.integers(1, 500).map(TopKLogitsWarper),
    st.floats(0.0, 1.0).map(TopPLogitsWarper),
    st.floats(0.0, 1.0).map(MinPLogitsWarper),
)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10_000), vocab=st.one_of(st.integers(1, 12), st.integers(200, 1500)), scale=st.floats(0.1, 9.0),
    masked=st.floats(0.0, 0.9), whole=st.booleans(), chain=st.lists(WARPERS, max_size=4),
)  # fmt: skip
def test_any_chain_is_transformers_own(
    seed: int, vocab: int, scale: float, masked: float, whole: bool, chain: list[LogitsProcessor]
) -> None:
    """Each token's probability; where scores tie, a top-p cut may keep another of them."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=vocab) * scale
    scores = np.round(scores) if whole else scores
    scores[rng.random(vocab) < masked] = -np.inf
    scores[rng.integers(vocab)] = 1.0
    row = torch.tensor(scores, dtype=torch.float32)
    assume(far_from_the_edge(chain, row))
    found, wanted = torch.from_numpy(Warpers(chain).distribution(row.numpy())), theirs(chain, row)
    if whole:
        found, wanted = found.sort().values, wanted.sort().values
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_a_nucleus_of_any_size_in_a_whole_vocabulary(scale: float, top_p: float) -> None:
    row = torch.tensor(np.random.default_rng(5).normal(size=49_152) * scale, dtype=torch.float32)
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(top_p)]
    found, wanted = torch.from_numpy(Warpers(chain).distribution(row.numpy())), theirs(chain, row)
    # Their sum over the vocabulary rounds: a token or two at the edge may be kept or not.
    assert abs(int((found > 0).sum()) - int((wanted > 0).sum())) <= 1 + 0.002 * int((wanted > 0).sum())
    assert float((found - wanted).abs().sum()) < 1e-3


def test_the_row_stays_as_it_is_and_rows_without_a_distribution_are_told() -> None:
    row = np.array([1.0, 2.0, 3.0], np.float32)
    for chain in ([], [TopKLogitsWarper(2)], [TopPLogitsWarper(0.5)], [MinPLogitsWarper(0.3)]):
        Warpers(chain).distribution(row)
        assert row.tolist() == [1.0, 2.0, 3.0]
        for bad in ([np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf] * 3):
            with pytest.raises(RuntimeError, match="nan"):
                draw_from(Warpers(chain).distribution(np.array(bad, np.float32)), 0.5)


def test_unusual_warpers_are_left_to_transformers() -> None:
    class Own(TopKLogitsWarper):
        pass

    usual: list[LogitsProcessor] = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3), MinPLogitsWarper(0.1)]
    assert all(map(is_usual, usual))
    others: list[LogitsProcessor] = [Own(3), TopKLogitsWarper(3, filter_value=-5.0)]
    others.append(TopPLogitsWarper(0.1, min_tokens_to_keep=2))
    assert not any(map(is_usual, others))
    row = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    for other in others:
        chain = [*usual[:1], other, *usual[2:]]
        torch.testing.assert_close(Sampler(processors=chain).probabilities(row, [])[0], theirs(chain, row[0]))


@pytest.mark.parametrize("size", [1, 7, BLOCK, 3 * BLOCK + 5])
def test_draws_are_in_proportion_to_the_weights(size: int) -> None:
    """Evenly spaced points fall on every index as often as its weight says, to one."""
    rng, points = np.random.default_rng(size), 20_000
    weights = rng.random(size).astype(np.float32) ** 4
    weights[rng.random(size) < 0.3] = 0.0
    weights[size // 2] = 1.0
    seen = np.zeros(size)
    for i in range(points):
        seen[draw_from(weights, (i + 0.5) / points)] += 1
    assert not seen[weights == 0].any()
    assert np.abs(seen - points * weights / weights.sum(dtype=float)).max() <= 1 + 1e-6


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 700), point=st.sampled_from([0.0, 2.0**-53, 1 - 2.0**-53]))
def test_a_draw_never_leaves_the_weights(seed: int, size: int, point: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) < 0.1, np.exp(-30 * rng.random(size)), 0.0).astype(np.float32)
    weights[rng.integers(size)] = 1e-30
    assert weights[draw_from(weights, point)] > 0


def test_seeded_draws_repeat_and_take_one_random_number() -> None:
    one, other = (Sampler(0.7, top_k=40, seed=4) for _ in range(2))
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    first = [one.draw(one.probabilities(logits, [])[0]) for _ in range(50)]
    assert first == [other.draw(other.probabilities(logits, [])[0]) for _ in range(50)]
    assert len(set(first)) > 5
    skipped = Sampler(0.7, top_k=40, seed=4)
    torch.rand(10, dtype=torch.float64, generator=skipped.generator)
    assert [skipped.draw(skipped.probabilities(logits, [])[0]) for _ in range(40)] == first[10:]
