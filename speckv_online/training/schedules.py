"""Schedules of gamma that exact traces are replayed under, so that a predictor meets contexts of every kind."""

from __future__ import annotations

from collections.abc import Sequence

from policies.base import ARMS, Context, Decision, Policy
from speckv_online.simulate.cost_table import RTX3090_RELEASE, CostTable
from speckv_online.simulate.simulator import Replay, Simulator
from speckv_online.traces.trace import Trace


class Schedule(Policy):
    """Draws gamma uniformly from a set at each step (from a set of one: always the same).

    Parameters
    ----------
    gammas : sequence of int
    seed : int
    """

    summary = "gamma drawn at random from a set"

    def __init__(self, gammas: Sequence[int] = ARMS, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.gammas = tuple(gammas)

    def decide(self, context: Context) -> Decision:
        gamma = self.gammas[int(self.rng.integers(len(self.gammas)))]
        return Decision(self.new_id(), gamma, propensity=1 / len(self.gammas))


def schedule_gammas() -> dict[str, tuple[int, ...]]:
    """Return named sets of gammas to draw from: short and long fixed drafts, any, and seldom any at all."""
    fixed = {f"fixed:{gamma}": (gamma,) for gamma in (1, 2, 4, 8)}
    return fixed | {f"random:{i}": ARMS[1:] for i in range(3)} | {"sparse": (0, 0, 1, 2, 4), "rare": (0,) * 8 + (1, 4)}


def replay_untimed(trace: Trace, schedule: Schedule) -> Replay:
    """Replay a trace where seconds play no part: the costs are those of any level."""
    return Simulator(schedule, CostTable("any", {trace.level: RTX3090_RELEASE.levels["fp16"]})).replay(trace)
