"""How fast the simulator is: steps per second of every policy on one core, beside what is wanted of it.

Made-up traces of a real trace's size, or real ones with ``--traces``; costs of the published release. Policies come as
``speckv simulate`` runs them, guards included, and take turns; the best of some turns counts, since a disturbance only
ever makes a turn slower. Seconds are of CPU time: what waits for other processes does not count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import process_time

import numpy as np

from experiments.config import launch, option
from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, N_SIGNALS
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import RTX3090_RELEASE
from speckv_online.simulate.hindsight import by_level
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace, agreement, load_traces

#: Steps per second that are wanted: of a fixed gamma, and of a policy that learns.
FIXED, LEARNED = 100_000, 20_000


@dataclass(frozen=True)
class SimulatorConfig:
    """Settings of ``python -m experiments.bench.simulator``."""

    policies: tuple[str, ...] = option(
        ("fixed:4", "mlp16", "online", "linucb", "lints"), "policies to time, comma separated"
    )
    traces: str = option("", "directory of traces (default: made-up ones)")
    turns: int = option(25, "turns of each policy, of which the best counts")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.turns < 1 or not self.policies:
            raise UserError("--turns must be at least 1, and --policies must name at least one")


def made_up(count: int = 80, length: int = 64) -> list[Trace]:
    """As many traces as a level of a profile has, whose draft is right with a probability that is its confidence."""
    rng = np.random.default_rng(0)
    tokens = np.arange(1, length + 1, dtype=np.int32)
    follow = np.append(tokens, np.full(MAX_GAMMA, -7, np.int32))[np.arange(length)[:, None] + np.arange(MAX_GAMMA)]
    traces = []
    for i in range(count):
        confidence = rng.beta(1.2, 1.2, (length, MAX_GAMMA))
        drafts = np.where(rng.random(confidence.shape) < confidence, follow, 0).astype(np.int32)
        signals = np.zeros((length, MAX_GAMMA, N_SIGNALS), dtype=np.float32)
        signals[..., CONFIDENCE], signals[..., ENTROPY] = confidence, 6 * (1 - confidence)
        signals[..., MARGIN] = 8 * confidence
        prompt = np.arange(60, dtype=np.int32)
        accepted = agreement(drafts, tokens)
        traces.append(Trace("int8", "chat", f"p{i}", prompt, tokens, drafts, accepted, signals, length, "length"))
    return traces


def measure(config: SimulatorConfig) -> list[dict[str, float | str]]:
    """Return steps per second, and their ratio to what is wanted, per policy."""
    traces = next(iter(by_level(load_traces(config.traces)).values())) if config.traces else made_up()
    rates: dict[str, float] = dict.fromkeys(config.policies, 0.0)
    for turn in range(config.turns):
        for spec in config.policies:
            policy = make_policy(spec, seed=turn)
            tell_costs(policy, RTX3090_RELEASE, RTX3090_RELEASE.levels)
            simulator = Simulator(policy, RTX3090_RELEASE)
            clock = process_time()
            steps = len(simulator.run(traces))
            rates[spec] = max(rates[spec], steps / (process_time() - clock))
    wanted = {spec: FIXED if spec.startswith(("fixed", "autoregressive")) else LEARNED for spec in rates}
    return [
        {"policy": s, "steps_per_second": rate, "wanted": wanted[s], "ratio": rate / wanted[s]}
        for s, rate in rates.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(show, SimulatorConfig, argv)


def show(config: SimulatorConfig) -> None:
    """Measure and print."""
    rows = measure(config)
    if config.json:
        print(json.dumps(rows))
        return
    print(f"{'policy':<28} {'steps/s':>10} {'wanted':>9} {'ratio':>6}  (measured, CPU time of one core)")
    for row in rows:
        print(f"{row['policy']:<28} {row['steps_per_second']:>10,.0f} {row['wanted']:>9,} {row['ratio']:>6.2f}")


if __name__ == "__main__":
    sys.exit(main())
