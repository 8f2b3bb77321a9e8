"""The online cost model of a policy."""

from __future__ import annotations

from policies.base import ARMS, Outcome, State
from policies.costs.level_costs import HALF_LIFE, LevelCosts
from policies.costs.prior import VAGUE, CostPrior
from policies.level_features import describe, level_bits

__all__ = ["CostModel", "CostPrior"]


class CostModel:
    """:class:`~policies.costs.level_costs.LevelCosts` by compression level.

    Parameters
    ----------
    half_life : float
        Steps after which a measured time counts half.
    arms : tuple of int
        Gammas whose seconds and price :class:`~policies.costs.level_costs.LevelCosts` keeps at hand.
    """

    def __init__(self, half_life: float = HALF_LIFE, arms: tuple[int, ...] = ARMS) -> None:
        self.half_life, self.arms = half_life, arms
        self.levels: dict[str, LevelCosts] = {}
        self._described: dict[str, tuple[int, tuple[float, float, float]]] = {}

    def level(self, name: str) -> LevelCosts:
        """Return a level's costs, made on first use."""
        found = self.levels.get(name)
        if found is None:
            found = self.levels[name] = LevelCosts(VAGUE, self.half_life, self.arms)
        return found

    def describe(self, name: str) -> tuple[float, float, float]:
        """Return what carries over to a level never met before: see :func:`~policies.level_features.describe`."""
        costs = self.level(name)
        version, found = self._described.get(name, (-1, (0.0, 0.0, 0.0)))
        if version != costs.version:
            verify, wide = costs.verify.item(0), costs.verify.item(8)
            found = describe(level_bits(name), costs.draft, verify, wide)
            self._described[name] = costs.version, found
        return found

    def set_prior(self, level: str, prior: CostPrior) -> None:
        """Set what is known of a level beforehand."""
        self.level(level).set_prior(prior)

    def observe(self, outcome: Outcome) -> None:
        """Take in one step's times."""
        (self.levels.get(outcome.level) or self.level(outcome.level)).observe(outcome)

    def state(self) -> State:
        """All levels' states; keys are ``cost.<level>.<array>``."""
        return {f"cost.{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.state().items()}

    def load(self, state: State) -> None:
        """Restore :meth:`state`."""
        known, self.levels = self.levels, {}
        self._described.clear()
        for name, part in split_levels(state).items():
            if name in known:  # it has seen the machine's pace
                self.levels[name] = known[name]
            self.level(name).load(part)

    def take_delta(self) -> State:
        """Sums gathered since the last call, for every level."""
        return {f"cost.{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.take_delta().items()}

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        for name, part in split_levels(delta).items():
            self.level(name).merge(part)


def split_levels(state: State, prefix: str = "cost.") -> dict[str, State]:
    """Group ``cost.<level>.<array>`` keys, or those with another prefix, by level; other keys are left out."""
    found: dict[str, State] = {}
    for key, value in state.items():
        if key.startswith(prefix):
            level, _, array = key.removeprefix(prefix).rpartition(".")
            found.setdefault(level, {})[array] = value
    return found
