"""Rules with one threshold, tuned in hindsight: the best of each kind on the very traces that it is scored on.

They are no policies but a yardstick: what the right threshold would have given, had it been known. Label them as
hindsight wherever they are shown.

=============  =======================================================================================================
confidence     stop after the first token below the threshold (transformers' rule with a constant threshold)
llamacpp       the same, and withhold that token (llama.cpp's p-min)
svip           stop after the first token with sqrt(0.15 H) above the threshold, H in nats (arXiv 2411.18462)
adaedl         AdaEDL (arXiv 2410.18351) by its target acceptance rate and first threshold; it adapts as published
=============  =======================================================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MAX_GAMMA
from policies.baselines.adaedl import AdaEdl
from policies.baselines.svip import LN2
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.simulator import Replay, Simulator, replay_plan
from speckv_online.traces.trace import Trace

CONFIDENCES = (*(round(0.02 * i, 2) for i in range(1, 50)), 0.99, 0.995)
SVIP_THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 50))
ADAEDL_TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ADAEDL_THRESHOLDS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Tuned:
    """The best setting of one kind of rule: its name with the setting, and its replay of each trace."""

    kind: str
    setting: str
    replays: list[Replay]

    @property
    def goodput(self) -> float:
        """Tokens per modelled second."""
        return Replay.join(self.replays).goodput


def tuned(traces: Sequence[Trace], cost: CostTable) -> list[Tuned]:
    """Return the best threshold rule of every kind on traces, in hindsight."""
    best: dict[str, Tuned] = {}
    for rule in itertools.chain(_static(traces, cost), _adaptive(traces, cost)):
        if rule.kind not in best or rule.goodput > best[rule.kind].goodput:
            best[rule.kind] = rule
    return list(best.values())


def ask_per_token(below: np.ndarray) -> np.ndarray:
    """Return how many tokens are drafted if a step stops after the first True of each row, shape (L,)."""
    return np.where(below.any(axis=1), below.argmax(axis=1) + 1, below.shape[1])


def _static(traces: Sequence[Trace], cost: CostTable) -> Iterator[Tuned]:
    for threshold in CONFIDENCES:
        below = [t.signals[:, :MAX_GAMMA, CONFIDENCE].astype(float) < threshold for t in traces]
        plans = [(ask_per_token(b), ask_per_token(b) - b.any(axis=1)) for b in below]
        for kind, withhold in (("confidence", 0), ("llamacpp", 1)):
            yield Tuned(kind, f"{threshold:g}", _replay(traces, [(p[0], p[withhold]) for p in plans], cost))
    for threshold in SVIP_THRESHOLDS:
        limit = threshold * threshold / (0.15 * LN2)
        drafted = [ask_per_token(t.signals[:, :MAX_GAMMA, ENTROPY].astype(float) > limit) for t in traces]
        yield Tuned("svip", f"{threshold:g}", _replay(traces, [(d, d) for d in drafted], cost))


def _replay(traces: Sequence[Trace], plans: list[tuple[np.ndarray, np.ndarray]], cost: CostTable) -> list[Replay]:
    return [replay_plan(t, *plan, cost.level(t.level)) for t, plan in zip(traces, plans, strict=True)]


def _adaptive(traces: Sequence[Trace], cost: CostTable) -> Iterator[Tuned]:
    for target, threshold in itertools.product(ADAEDL_TARGETS, ADAEDL_THRESHOLDS):
        simulator = Simulator(AdaEdl(threshold=threshold, target=target), cost)
        yield Tuned("adaedl", f"target {target:g} from {threshold:g}", [simulator.replay(t) for t in traces])
