"""Warm start: how many steps a policy needs to reach its final goodput, from trained weights and from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.streams.walker import again, endless, reached, relative, settle, visit
from policies.acceptance.mlp16 import HIDDEN, Weights
from policies.registry import make_policy
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace

SHARE, PART = 0.95, 1 / 3
BIN = 100
#: Pseudo-records that an untrained start counts for: next to nothing.
UNTRAINED = 1.0
#: Typical spread of MLP16's inputs: entropies in bits, confidences, level code, gamma.
_SPREAD = np.array([2.0, 0.5, 4.0, 0.5, 1.0, 8.0])


@dataclass(frozen=True)
class Start:
    """Warm and cold starts of one policy on one level's traces.

    Attributes
    ----------
    warm, cold : ndarray of int, shape (orders,)
        Steps to reach 95 % of the final goodput.
    warm_curve, cold_curve : ndarray, shape (steps / BIN,)
        Goodput relative to the final one, by steps, all orders together.
    """

    policy: str
    warm: np.ndarray
    cold: np.ndarray
    warm_curve: np.ndarray
    cold_curve: np.ndarray

    @property
    def verdict(self) -> str:
        """Whether the median warm start takes at most a third of the median cold start's steps, if that takes any."""
        warm, cold_ = np.median(self.warm), np.median(self.cold)
        if not cold_:
            return "nothing to save" if not warm else "**fail**"
        return "pass" if warm <= PART * cold_ else "**fail**"

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Start:
        """Read what :meth:`as_json` gave."""
        return cls(found["policy"], *(np.array(found[key]) for key in ("warm", "cold", "warm_curve", "cold_curve")))


def cold(spec: str, seed: int) -> dict[str, Any]:
    """Return the options that make a policy start from nothing: an untrained network, or no acceptance weights."""
    if spec.partition(":")[0] == "goodput":
        return {"acceptance": "none"}
    rng = np.random.default_rng([seed, 16])
    # He et al. (2015): variance 2 / inputs; the head predicts one acceptance rate for everything.
    w1 = rng.normal(0.0, (2 / len(_SPREAD)) ** 0.5, (len(_SPREAD), HIDDEN)) / _SPREAD[:, None]
    weights = Weights(w1, rng.normal(0.0, 0.5, HIDDEN), np.zeros((HIDDEN, 1)), np.array([0.5]))
    return {"weights": weights, "strength": UNTRAINED}


def start(
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    *,
    orders: int = 20,
    steps: int = 3000,
    settling: int = 4000,
    seed: int = 0,
    weights: Mapping[str, Any] = MappingProxyType({}),
) -> Start:
    """Start a policy warm and cold in several orders of the traces, and compare with its settled copy on the same ones.

    Both starts are told the costs, as a worker's calibration does: what differs is what they know of acceptance. The
    warm start is the policy's own, or with other ``weights`` of its options.
    """
    edges = np.append(np.arange(0, steps, BIN), np.inf)
    counts: dict[str, list[int]] = {"warm": [], "cold": []}
    sums = {name: np.zeros((2, len(edges) - 1)) for name in counts}
    for order in range(seed, seed + orders):
        final = settle(make_policy(spec, seed=order, **weights), traces, cost, settling, order)
        for name, options in (("warm", weights), ("cold", cold(spec, order))):
            policy = make_policy(spec, seed=order, **options)
            tell_costs(policy, cost, cost.levels)
            met = visit(Simulator(policy, cost), name, endless(traces, order), steps)
            same = again(final, met.traces, cost)
            counts[name].append(reached(met.steps, met.seconds, same, SHARE))
            sums[name] += np.array(relative(met.steps, met.seconds, same, edges))
    curves = {name: both[1] / np.maximum(both[0], 1e-12) for name, both in sums.items()}
    return Start(spec, np.array(counts["warm"]), np.array(counts["cold"]), curves["warm"], curves["cold"])


def as_rows(where: str, found: Start) -> list[str]:
    """Cells of a table row."""
    warm, cold_ = np.median(found.warm), np.median(found.cold)
    spread = [f"{np.quantile(x, 0.25):.0f} to {np.quantile(x, 0.75):.0f}" for x in (found.warm, found.cold)]
    return [
        where,
        f"`{found.policy}`",
        f"{warm:.0f} ({spread[0]})",
        f"{cold_:.0f} ({spread[1]})",
        f"{found.warm_curve[0]:.3f}",
        f"{found.cold_curve[0]:.3f}",
        found.verdict,
    ]
