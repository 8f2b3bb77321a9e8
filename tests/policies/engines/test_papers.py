"""Bandits of papers against a second reading of their formulas, 10,000 random steps each: the same decisions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, Context, Outcome
from policies.baselines.nightjar import Nightjar
from policies.baselines.tapout import TapOut
from tests.policies.engines.random_steps import STEPS, accepted, draft, drafted, outcome


class NightjarReading:
    """One batch size. Gammas by bins, all drawn from a numpy generator; every step's tokens and seconds are kept."""

    def __init__(self, rng: np.random.Generator, most: int, decay: float) -> None:
        self.rng, self.most, self.decay = rng, most, decay
        self.rates: dict[int, list[float]] = defaultdict(list)
        self.usual: list[tuple[int, float]] = []
        self.extra: list[float] = []
        self.gamma, self.explored, self.kept = 0, 0, 0
        self.plan = self.bins()
        self.gamma = next(self.plan)

    def bins(self) -> Iterator[int]:
        """The gamma of every step, for ever."""
        j = 0
        while True:
            j += 1
            block = 2 ** (j - 1)
            width = math.floor(math.sqrt(block))
            for b in range(1, math.ceil(block / width) + 1):
                if self.rng.random() < 1 / b**self.decay:
                    gamma, self.explored = int(self.rng.integers(self.most + 1)), self.explored + 1
                else:
                    gamma, self.kept = self.greedy(), self.kept + 1
                for _ in range(width):
                    yield gamma

    def greedy(self) -> int:
        price = float(np.mean(self.extra)) if self.extra and self.gamma == 0 else 0.0
        found = {g: 1 / float(np.mean(self.rates[g])) + (price / g if g else 0.0) for g in sorted(self.rates)}
        best = min(found.values())
        return min(g for g in found if found[g] <= best * (1 + 1e-12))

    def step(self, rows: list[Outcome], uncut: bool, restarted: bool) -> None:
        made = [o for o in rows if o.drafted]
        if made and restarted and self.usual:
            forwards, seconds = np.sum(self.usual, axis=0)
            spent = sum(o.draft_seconds for o in made)
            self.extra.append(max(spent - sum(o.drafted for o in made) * seconds / forwards, 0.0))
        elif made and not restarted:
            self.usual.append((sum(o.drafted for o in made), sum(o.draft_seconds for o in made)))
        if uncut:
            self.rates[self.gamma].append(np.mean([o.produced for o in rows]) / sum(o.seconds for o in rows))
        self.gamma = next(self.plan)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("rows", [1, 4])
def test_nightjar(rows: int, decay: float) -> None:
    """Drafting pays for half of the time; restarts are dear. Rows of a batch share its seconds."""
    rng, policy = np.random.default_rng(rows), Nightjar(most=4, decay=decay, seed=3)
    level = f"nf4@{rows}" if rows > 1 else "nf4"
    reading, idle = None, 0
    gammas: Counter[int] = Counter()
    for i in range(STEPS // rows):
        limit = int(rng.integers(0, 4)) if rng.random() < 0.1 else MAX_GAMMA
        decisions = [policy.decide(Context(level=level, max_gamma=limit, idle=idle)) for _ in range(rows)]
        reading = reading or NightjarReading(np.random.default_rng([3, 0]), 4, decay)
        k = min(reading.gamma, limit)
        assert {d.gamma for d in decisions} == {k}, i
        gammas[k] += 1
        found = []
        for _ in decisions:
            signals, match = drafted(rng, 2.0 if i * rows < STEPS // 2 else -1.0)
            o = outcome(k, accepted(match, k), signals, level=level)
            o.seconds = float(1.0 + 0.15 * k + 0.1 * rng.random())
            o.draft_seconds = float(k * (0.1 + 0.05 * rng.random()) + (0.4 if idle else 0.0)) if k else 0.0
            found.append(o)
        reading.step(found, k == reading.gamma, idle > 0)
        for decision, o in zip(decisions, found, strict=True):
            policy.learn(decision, o)
        idle = 0 if k else idle + 1
    assert reading is not None
    assert set(gammas) == set(range(5))
    assert reading.explored > 20
    assert reading.kept > 20
    assert reading.extra  # it was switched on again
    assert policy.bins(level).switch() == pytest.approx(np.mean(reading.extra))


def test_nightjar_keeps_batch_sizes_apart() -> None:
    """Eight rows are slow to draft for, one is quick: each size ends at its own gamma."""
    policy = Nightjar(seed=1)
    for _ in range(3000):
        for level, price in (("nf4", 0.01), ("nf4@8", 2.0)):
            rows = 8 if "@" in level else 1
            decisions = [policy.decide(Context(level=level)) for _ in range(rows)]
            for decision in decisions:
                k = decision.gamma
                o = Outcome(k, k, k, k + 1, 1.0 + price * k, 0.0, 0.0, level, signals=np.zeros((k, 4)))
                policy.learn(decision, o)
    best = {level: int(policy.bins(level).rates[0].argmax()) for level in ("nf4", "nf4@8")}
    assert best == {"nf4": 3, "nf4@8": 0}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_tapout(alpha: float) -> None:
    rng, policy = np.random.default_rng(5), TapOut(alpha=alpha, cap=12)
    rewards: list[list[float]] = [[] for _ in range(5)]
    least, rate = 0.4, 0.9  # AdaEDL's threshold and acceptance rate
    lengths = set()
    for i in range(STEPS):
        limit = int(rng.integers(0, MAX_GAMMA)) if rng.random() < 0.1 else MAX_GAMMA
        signals, match = drafted(rng, math.sin(i / 700))
        nats = rng.exponential(0.3 + 0.9 * (1.0 - signals[:, CONFIDENCE]))
        signals[:, ENTROPY], signals[:, MARGIN] = nats / math.log(2.0), rng.exponential(4.0, MAX_GAMMA)
        decision = policy.decide(Context(level="nf4", max_gamma=limit))
        played = [len(r) for r in rewards]
        if 0 in played:
            arm = played.index(0)
        else:
            t = sum(played)
            bounds = [sum(r) / len(r) + math.sqrt(2 * math.log(t) / len(r)) for r in rewards]
            arm = bounds.index(max(bounds))
        most = min(12, limit)
        assert decision.gamma == most
        stops = [
            signals[:, CONFIDENCE] < 0.4, nats > 1.0, np.sqrt(0.15 * nats) > 0.3, 1.0 - np.sqrt(0.2 * nats) < least,
            signals[:, MARGIN] < 1.0,
        ][arm]  # fmt: skip
        k = draft(policy, decision, signals)
        assert k == next((j + 1 for j in range(most) if stops[j]), most), i
        lengths.add(k)
        n = accepted(match, k)
        policy.learn(decision, outcome(k, n, signals))
        if not k or most < 12:
            continue
        rewards[arm].append(alpha * n / 12 + (1 - alpha) * n / k)
        if arm == 3:
            rate = 0.5 * rate + 0.5 * n / k
            wanted = least + 0.01 if rate < 0.9 else least - 0.01 if n < 12 else least
            least = 0.9 * least + 0.1 * wanted
    assert policy.sums[0].tolist() == [len(r) for r in rewards]
    assert policy.sums[1] == pytest.approx([sum(r) for r in rewards])
    assert policy.adaedl.threshold == pytest.approx(least)
    assert min(map(len, rewards)) > 100
    assert lengths >= set(range(1, 13))
