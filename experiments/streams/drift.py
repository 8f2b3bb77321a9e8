"""Drift: streams of traces that change their level, task or draft, and how soon a policy is back where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.streams.walker import Visit, again, change, relative, settle
from policies.base import MAX_GAMMA
from policies.registry import make_policy
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.simulator import replay_fixed
from speckv_online.stats import Estimate, paired_ratio
from speckv_online.traces.trace import Trace

SHARE, WITHIN = 0.95, 300
BIN = 100


@dataclass(frozen=True)
class Drift:
    """One policy on one changing stream.

    Attributes
    ----------
    relative : ndarray, shape (period / BIN,)
        Goodput relative to the settled copy's, by steps since the change, all changes together.
    unseen : ndarray, shape (period / BIN,) or (0,)
        The same relative to a copy that has settled on other prompts, if there were any.
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
    unseen: np.ndarray
    kinds: dict[str, float]
    over_fixed: dict[int, float]
    nearest: Estimate

    @property
    def back(self) -> dict[str, int | None]:
        """Steps after a change from which on every bin is at least :data:`SHARE` of the stationary goodput."""
        return {name: _back(getattr(self, name)) for name in ("relative", "unseen")}

    @property
    def nearest_gamma(self) -> int:
        """The fixed gamma that comes closest."""
        return min(self.over_fixed, key=lambda gamma: self.over_fixed[gamma])

    @property
    def holds(self) -> dict[str, bool]:
        """Whether it is back in time, by either settled copy, and beats every fixed gamma."""
        found = {name: back is not None and back <= WITHIN for name, back in self.back.items()}
        return found | {"beats": self.nearest.value > 1.0}

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return asdict(self) | {"relative": self.relative.tolist(), "unseen": self.unseen.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Drift:
        """Read what :meth:`as_json` gave."""
        own: dict[str, Any] = {name: np.array(found[name]) for name in ("relative", "unseen")}
        own["nearest"] = Estimate(**found["nearest"])
        own["over_fixed"] = {int(gamma): x for gamma, x in found["over_fixed"].items()}
        return cls(**found | own)


def _back(relative: np.ndarray) -> int | None:
    below = np.flatnonzero(relative < SHARE)
    start = 0 if not len(below) else int(below[-1] + 1)
    return None if start == len(relative) else start * BIN


def drift(
    spec: str,
    kinds: Mapping[str, Sequence[Trace]],
    cost: CostTable,
    *,
    others: Mapping[str, Sequence[Trace]] | None = None,
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
    others : mapping of str to sequence of Trace, optional
        Traces of other prompts, of every kind, on which a second copy settles.
    period, rounds, settling : int
        Steps between changes, changes to every kind, and steps that a settled copy has behind it.
    seeds : sequence of int
        One stream each.
    """
    edges = np.append(np.arange(0, period, BIN), np.inf)
    schools = {"relative": kinds} | ({"unseen": others} if others else {})
    sums = {name: np.zeros((2, len(edges) - 1)) for name in schools}
    late: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in kinds}
    visits: list[Visit] = []
    changes = 0
    for seed in seeds:
        settled = {
            name: {k: settle(make_policy(spec, seed=seed), own[k], cost, settling, seed) for k in kinds}
            for name, own in schools.items()
        }
        met = change(make_policy(spec, seed=seed), kinds, cost, period, rounds, seed)
        for v in met[1:]:  # the first visit is a start, not a change
            for name, copies in settled.items():
                both = relative(v.steps, v.seconds, again(copies[v.kind], v.traces, cost), edges)
                sums[name] += np.array(both)
                if name == "relative":
                    late[v.kind][0] += both[1][WITHIN // BIN :].sum()
                    late[v.kind][1] += both[0][WITHIN // BIN :].sum()
        changes += len(met) - 1
        visits += met
    by_kind = {kind: same / seconds for kind, (same, seconds) in late.items()}
    found = {name: still / own for name, (own, still) in sums.items()}
    unseen = found.get("unseen", np.empty(0))
    return Drift(spec, changes, found["relative"], unseen, by_kind, *against_fixed(visits, cost))


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
    gamma, ratio = found.nearest_gamma, found.nearest
    kind = min(found.kinds, key=lambda k: found.kinds[k])
    verdict = {name: "pass" if good else "**fail**" for name, good in found.holds.items()}
    back = {name: f"{'never' if steps is None else steps} {verdict[name]}" for name, steps in found.back.items()}
    return [
        stream,
        f"`{found.policy}`",
        str(found.changes),
        f"{found.relative[0]:.3f}",
        back["relative"],
        f"{found.kinds[kind]:.3f} ({kind})",
        *([f"{found.unseen[0]:.3f}", back["unseen"]] if len(found.unseen) else []),
        f"{ratio.text(3)} (γ {gamma}) {verdict['beats']}",
    ]
