"""What a decision costs: microseconds of decide, proceed and learn per policy, beside scikit-learn's MLPRegressor.

The published policy asks a scikit-learn MLPRegressor of 16 units for four predictions per decision, one per gamma. Here
every policy meets the same steps: made-up contexts and signals, acceptance that follows confidence, costs near those of
a small model on a CPU. Policies come as decoding uses them, guards included. Times are wall clock, of one call each;
all policies take turns in blocks, so that a busy machine is busy for all. numpy uses one thread, as in a worker.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from experiments.config import launch, option
from policies.base import MAX_GAMMA, N_SIGNALS, Context, Draft, Outcome, Policy
from policies.guards.fault import FaultGuard
from policies.registry import BUILTIN, make_policy
from speckv_online.context import History
from speckv_online.errors import UserError

BLOCK = 200
REFERENCE = "scikit-learn MLPRegressor(16), four predict calls"


@dataclass(frozen=True)
class BenchConfig:
    """Settings of ``python -m experiments.bench.policies``."""

    policies: tuple[str, ...] = option(tuple(BUILTIN), "policies to time, comma separated")
    steps: int = option(4000, "steps per policy")
    seed: int = option(0, "seed of the steps and of the policies")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.steps < BLOCK:
            raise UserError(f"--steps must be at least {BLOCK}, got {self.steps}")
        if not self.policies:
            raise UserError("--policies is empty: name at least one")


class Timed:
    """One policy and the times of its calls, in seconds."""

    def __init__(self, spec: str, seed: int) -> None:
        policy: Policy = make_policy(spec, seed=seed)
        self.policy, self.rng = FaultGuard(policy), np.random.default_rng(seed)
        self.decide: list[float] = []
        self.proceed: list[float] = []
        self.learn: list[float] = []
        self.history = History("nf4", "", 100)
        self.signals = np.zeros((MAX_GAMMA, N_SIGNALS))

    def run(self, steps: int) -> None:
        """Take some steps, a new sequence after every 64 tokens."""
        policy, rng = self.policy, self.rng
        for _ in range(steps):
            if self.history.position >= 64:
                self.history = History("nf4", "", 100)
                policy.begin(self.history.context())
            context = self.history.context()
            confidence = rng.beta(1.5, 0.8, MAX_GAMMA)
            rows = np.column_stack([5 * (1 - confidence), confidence, 8 * confidence, rng.integers(-4, 5, MAX_GAMMA)])
            hits = rng.random(MAX_GAMMA) < confidence
            self._step(context, rows, hits)

    def _step(self, context: Context, rows: np.ndarray, hits: np.ndarray) -> None:
        policy, signals = self.policy, self.signals
        clock = perf_counter()
        decision = policy.decide(context)
        self.decide.append(perf_counter() - clock)
        k = 0
        while k < decision.gamma:
            signals[k] = rows[k]
            k += 1
            if decision.stops and k < decision.gamma:
                draft = Draft(k, signals[:k])
                clock = perf_counter()
                go_on = policy.proceed(decision, draft)
                self.proceed.append(perf_counter() - clock)
                if not go_on:
                    break
        drafted = k
        if decision.stops and k:
            k = policy.submit(decision, Draft(k, signals[:k]))
        n = k if hits[:k].all() else int(hits[:k].argmin())
        drafting, verify, length = 0.009 * drafted, 0.16 + 0.01 * k, context.context_length
        seconds = drafting + verify + 0.001
        outcome = Outcome(
            k, n, min(n + 1, k), n + 1, seconds, drafting, verify, "nf4", length, 0, rows[:k], forwards=drafted
        )
        clock = perf_counter()
        policy.learn(decision, outcome)
        self.learn.append(perf_counter() - clock)
        self.history.update(outcome)


def reference(seed: int) -> Callable[[], float]:
    """Return a function that times one decision of the published policy, as its code makes it."""
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng(seed)
    x = rng.random((400, 6))
    model = MLPRegressor(hidden_layer_sizes=(16,), max_iter=20, random_state=42, tol=1.0).fit(x, x[:, 1])

    def once() -> float:
        clock = perf_counter()
        max((2, 4, 6, 8), key=lambda g: model.predict(np.array([[1.5, 0.6, 3.0, 0.2, 2.0, g]]))[0] * g + 1)
        return perf_counter() - clock

    return once


def measure(config: BenchConfig) -> dict[str, dict[str, float]]:
    """Return microseconds: policy -> decide, proceed, learn (p50 and p99) and the mean of a whole step."""
    policies = {spec: Timed(spec, config.seed) for spec in config.policies}
    decision, predicted = reference(config.seed), list[float]()
    done = 0
    while done < config.steps:
        count = min(BLOCK, config.steps - done)
        for policy in policies.values():
            policy.run(count)
        predicted += [decision() for _ in range(max(count // 10, 1))]
        done += count
    rows = {REFERENCE: _row(predicted, [], [])}
    return rows | {spec: _row(p.decide, p.proceed, p.learn) for spec, p in policies.items()}


def _row(decide: list[float], proceed: list[float], learn: list[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, times in (("decide", decide), ("proceed", proceed), ("learn", learn)):
        if times:
            found[f"{name}_p50"], found[f"{name}_p99"] = (float(v) for v in np.percentile(times, [50, 99]) * 1e6)
    found["step_mean"] = (sum(decide) + sum(proceed) + sum(learn)) / len(decide) * 1e6
    return found


def show(rows: dict[str, dict[str, float]]) -> str:
    """Format the measurements as a table."""
    names = ("decide_p50", "decide_p99", "proceed_p50", "proceed_p99", "learn_p50", "learn_p99", "step_mean")
    width = max(len(spec) for spec in rows) + 2
    lines = ["microseconds, measured; step_mean adds up all calls of a step"]
    lines.append(" " * width + "".join(f"{name:>13}" for name in names) + f"{'cheaper':>10}")
    base = rows[REFERENCE]["decide_p50"]
    for spec, row in rows.items():
        cells = "".join(f"{row[name]:13.1f}" if name in row else f"{'-':>13}" for name in names)
        lines.append(f"{spec:<{width}}{cells}{base / row['decide_p50']:9.0f}x")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(bench, BenchConfig, argv)


def bench(config: BenchConfig) -> int:
    """Run the benchmark and print it."""
    rows = measure(config)
    print(json.dumps(rows, indent=1) if config.json else show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
