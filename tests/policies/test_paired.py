"""Steps with drafts beside plain steps of the same minutes, on made-up machines."""

from __future__ import annotations

import numpy as np
import pytest

from policies.batches import Forward
from policies.costs.batch_costs import BatchCosts
from policies.costs.paired import FEWEST, FIRST, TRIES, Paired


def plain(seconds: float, rows: int = 4) -> Forward:
    return Forward("bf16@4", rows, rows, 0, 0, 0, seconds, 0.0, seconds)


def drafted(seconds: float, rows: int = 4, read: int = 0) -> Forward:
    return Forward("bf16@4", rows, 2 * rows, 1, rows, read, seconds, produced=rows)


def taught(*steps: Forward) -> tuple[Paired, BatchCosts]:
    found, costs = Paired(), BatchCosts()
    for _ in range(10):
        costs.observe(plain(0.030))
    for step in steps:
        found.observe(step, costs)
    return found, costs


def test_a_stall_moves_no_median() -> None:
    found, costs = taught(*[plain(0.045)] * 4, plain(9.0), plain(0.045))
    assert found.pace(costs) * costs.plain(4) == pytest.approx(0.045)
    assert Paired().pace(costs) == 1.0


def test_what_the_fit_does_not_see_is_seen() -> None:
    """Steps with drafts take three times a plain one, whatever the machine's speed, and the fit expects less."""
    rng = np.random.default_rng(0)
    steps = []
    for slowness in (1.0, 2.0):
        steps += [plain(0.030 * slowness) for _ in range(7)]
        steps += [drafted(0.090 * slowness * float(np.exp(0.02 * rng.normal()))) for _ in range(6)]
    found, costs = taught(*steps)
    expected = costs.step(drafted(1.0)) / costs.plain(4)
    assert expected < 2.0
    assert found.drafted == 12
    assert expected * np.exp(found.off(costs)) == pytest.approx(3.0, rel=0.12)
    assert expected < expected * np.exp(found.off(costs)) < 3.05


def test_noise_counts_for_nothing() -> None:
    found, costs = taught(*[plain(0.030)] * 7)
    usual = costs.step(drafted(1.0))
    for off in (0.03, -0.03, 0.02):
        found.observe(drafted(usual * float(np.exp(off))), costs)
    assert found.off(costs) == 0.0


def test_steps_that_mostly_read_are_left_out() -> None:
    found, costs = taught(*[plain(0.030)] * 7)
    found.observe(drafted(0.5, read=5000), costs)
    assert found.drafted == 0
    assert found.off(costs) == 0.0


def test_plain_steps_come_first_and_again() -> None:
    found, costs = taught()
    for _ in range(FIRST):
        assert found.ask_for_plain()
        found.observe(plain(0.030), costs)
    for _ in range(FEWEST):
        assert not found.ask_for_plain()
        found.observe(drafted(0.040), costs)
    assert found.ask_for_plain()
    found.observe(plain(0.030), costs)
    assert not found.ask_for_plain()
    for _ in range(FEWEST):
        found.observe(drafted(0.040), costs)
    # Where no plain step can be measured, drafts go on after some tries.
    asked = [found.ask_for_plain() for _ in range(TRIES + 2)]
    assert asked == [True] * (TRIES + 1) + [False]
