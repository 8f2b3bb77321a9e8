"""Drift: streams of traces that change their level, task or draft, and how soon a policy is back where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.streams import Visit, again, change, relative, settle
from policies.base import MAX_GAMMA
from policies.registry import make_policy
from speckv_online.cost import CostTable
from speckv_online.simulate import replay_fixed
from speckv_online.stats import Estimate, paired_ratio
from speckv_online.traces import Trace

SHARE, WITHIN = 0.95, 300
BIN = 100


@dataclass(frozen=True)
class Drift:
    """One policy on one changing stream.

    Attributes
    ----------
    relative : ndarray, shape (period / BIN,)
        Goodput relative to the settled copy's, by steps since the change, all changes together.
    kinds : dict of str to float
        The same after :data:`WITHIN` steps, by what the stream had changed to.
    over_fixed : dict of int to float
        Goodput over the whole stream, relative to every fixed gamma.
    nearest : Estimate
        The least of them, with its interval over prompts.
    """

    policy: str
    changes: int
    relative: np.ndarray
    kinds: dict[str, float]
    over_fixed: dict[int, float]
    nearest: Estimate

    @property
    def back(self) -> int | None:
        """Steps after a change from which on every bin is at least :data:`SHARE` of the stationary goodput."""
        below = np.flatnonzero(self.relative < SHARE)
        start = 0 if not len(below) else int(below[-1] + 1)
        return None if start == len(self.relative) else start * BIN

    @property
    def nearest_gamma(self) -> int:
        """The fixed gamma that comes closest."""
        return min(self.over_fixed, key=lambda gamma: self.over_fixed[gamma])

    @property
    def holds(self) -> dict[str, bool]:
        """Whether it is back in time, and beats every fixed gamma."""
        back = self.back
        return {"back": back is not None and back <= WITHIN, "beats": self.nearest.value > 1.0}

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return asdict(self) | {"relative": self.relative.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Drift:
        """Read what :meth:`as_json` gave."""
        own = {"relative": np.array(found["relative"]), "nearest": Estimate(**found["nearest"])}
        return cls(**found | own | {"over_fixed": {int(gamma): x for gamma, x in found["over_fixed"].items()}})


def drift(
    spec: str,
    kinds: Mapping[str, Sequence[Trace]],
    cost: CostTable,
    *,
    period: int = 1000,
    rounds: int = 3,
    seeds: Sequence[int] = range(3),
    settling: int = 4000,
) -> Drift:
    """Walk a policy over a changing stream in several orders, and its settled copies over the same traces.

    Parameters
    ----------
    spec : str
        See :mod:`policies.registry`.
    kinds : mapping of str to sequence of Trace
        What the stream changes between.
    cost : CostTable
        Where the seconds come from.
    period, rounds, settling : int
        Steps between changes, changes to every kind, and steps that a settled copy has behind it.
    seeds : sequence of int
        One stream each.
    """
    edges = np.append(np.arange(0, period, BIN), np.inf)
    own, still = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    late: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in kinds}
    visits: list[Visit] = []
    changes = 0
    for seed in seeds:
        settled = {k: settle(make_policy(spec, seed=seed), traces, cost, settling, seed) for k, traces in kinds.items()}
        met = change(make_policy(spec, seed=seed), kinds, cost, period, rounds, seed)
        for v in met[1:]:  # the first visit is a start, not a change
            calm = again(settled[v.kind], v.traces, cost)
            seconds, same = relative(v.steps, v.seconds, calm, edges)
            own += seconds
            still += same
            late[v.kind][0] += same[WITHIN // BIN :].sum()
            late[v.kind][1] += seconds[WITHIN // BIN :].sum()
        changes += len(met) - 1
        visits += met
    by_kind = {kind: same / seconds for kind, (same, seconds) in late.items()}
    return Drift(spec, changes, still / own, by_kind, *against_fixed(visits, cost))


def against_fixed(visits: Sequence[Visit], cost: CostTable) -> tuple[dict[int, float], Estimate]:
    """Return the goodput over all visits relative to every fixed gamma on the same traces.

    The least of them comes with its interval; it is paired by prompt.
    """
    prompts: dict[tuple[str, str], Any] = {}
    for v in visits:
        for trace, seconds in zip(v.traces, v.seconds.tolist(), strict=True):
            row = prompts.setdefault((v.kind, trace.prompt_id), [trace, 0, 0.0])
            row[1] += 1
            row[2] += seconds
    tokens = np.array([len(trace) * times for trace, times, _ in prompts.values()])
    own = np.array([seconds for *_, seconds in prompts.values()])
    fixed = {
        gamma: [
            times * float(replay_fixed(trace, gamma, cost.level(trace.level)).seconds.sum())
            for trace, times, _ in prompts.values()
        ]
        for gamma in range(MAX_GAMMA + 1)
    }
    nearest = min(fixed.values(), key=sum)
    return {gamma: sum(f) / float(own.sum()) for gamma, f in fixed.items()}, paired_ratio(tokens, own, tokens, nearest)


def as_rows(stream: str, found: Drift) -> list[str]:
    """Cells of a table row."""
    back = found.back
    gamma, ratio = found.nearest_gamma, found.nearest
    kind = min(found.kinds, key=lambda k: found.kinds[k])
    verdict = {name: "pass" if good else "**fail**" for name, good in found.holds.items()}
    return [
        stream,
        f"`{found.policy}`",
        str(found.changes),
        f"{found.relative[0]:.3f}",
        f"{'never' if back is None else back} {verdict['back']}",
        f"{found.kinds[kind]:.3f} ({kind})",
        f"{ratio.text(3)} (γ {gamma}) {verdict['beats']}",
    ]
