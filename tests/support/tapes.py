"""A small synthetic world: acceptance depends on signals and drifts with the text; seconds are modelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from policies.acceptance.mlp16 import HIDDEN, INPUTS, Weights
from policies.base import MAX_GAMMA, N_SIGNALS, Context, Decision, Draft, Outcome, Policy
from policies.fixed import Fixed
from speckv_online.context import History

#: level -> (t_d, T_v(1), growth of T_v per token), seconds: verifying is dear at fp16 and nearly flat at int8.
COSTS = {"fp16": (0.010, 0.050, 0.017), "int8": (0.010, 0.250, 0.004), "nf4": (0.010, 0.160, 0.010)}


@dataclass
class Tape:
    """One output text: does the draft agree at each position, and with which signals."""

    match: np.ndarray
    signals: np.ndarray

    def accepted(self, t: int, k: int) -> int:
        """Tokens accepted of k drafted at position t."""
        run = self.match[t : t + k]
        return len(run) if run.all() else int(run.argmin())


def make_tape(rng: np.random.Generator, length: int, ease: float = 0.0) -> Tape:
    """A text whose ease wanders between hard and easy stretches; confidence tells a good part of it."""
    total = length + MAX_GAMMA
    x = np.empty(total)
    x[0] = rng.normal()
    for t in range(1, total):
        x[t] = 0.9 * x[t - 1] + 0.44 * rng.normal()
    logit = ease + 1.6 * x + rng.normal(size=total)
    match = rng.random(total) < 1.0 / (1.0 + np.exp(-logit))
    confidence = 1.0 / (1.0 + np.exp(-(0.8 * logit + 0.5 * rng.normal(size=total))))
    signals = np.zeros((total, N_SIGNALS))
    signals[:, 0] = 4.0 * (1.0 - confidence) + 0.3 * rng.random(total)
    signals[:, 1] = confidence
    signals[:, 2] = 8.0 * confidence * rng.uniform(0.8, 1.2, total)
    agrees = rng.random(total) < np.where(match, 0.7, 0.4)
    signals[:, 3] = np.where(rng.random(total) < 0.6, np.where(agrees, 2.0, -2.0), 0.0)
    return Tape(match, signals)


def make_tapes(seed: int, texts: int, length: int = 120, ease: float = 0.0) -> list[Tape]:
    """Several texts."""
    rng = np.random.default_rng(seed)
    return [make_tape(rng, length, ease) for _ in range(texts)]


@dataclass
class Run:
    """What came of a run: totals, and the gamma of each step."""

    tokens: int = 0
    seconds: float = 0.0
    gammas: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def play(policy: Policy, tapes: list[Tape], level: str = "nf4", noise: float = 0.05, seed: int = 0) -> Run:
    """Let a policy decode the texts, in the order of calls of a decoder, learning at once."""
    rng, run = np.random.default_rng(seed), Run()
    t_d, verify, growth = COSTS[level]
    for tape in tapes:
        history, t, end = History(level, "", 50), 0, len(tape.match) - MAX_GAMMA
        policy.begin(history.context())
        while t < end:
            context = history.context(min(MAX_GAMMA, end - t - 1))
            decision, outcome, drafted = step(policy, context, tape, t)
            jitter = np.exp(noise * rng.normal(size=2))
            outcome.draft_seconds = t_d * drafted * jitter[0]
            outcome.verify_seconds = (verify + growth * outcome.drafted) * jitter[1]
            outcome.seconds = outcome.draft_seconds + outcome.verify_seconds + 0.001
            policy.learn(decision, outcome)
            run.tokens += outcome.produced
            run.seconds += t_d * drafted + verify + growth * outcome.drafted + 0.001
            run.gammas.append(outcome.drafted)
            run.accepted.append(outcome.accepted)
            history.update(outcome)
            t += outcome.produced
    return run


def step(policy: Policy, context: Context, tape: Tape, t: int) -> tuple[Decision, Outcome, int]:
    """Decide, draft, stop and submit; return the decision, the outcome without seconds, and the tokens drafted."""
    decision = policy.decide(context)
    assert 0 <= decision.gamma <= context.max_gamma
    signals = np.zeros((MAX_GAMMA, N_SIGNALS))
    k = 0
    while k < decision.gamma:
        signals[k] = tape.signals[t + k]
        k += 1
        if decision.ask_per_token and k < decision.gamma and not policy.proceed(decision, Draft(k, signals[:k])):
            break
    drafted = k
    if decision.ask_per_token and k:
        k = policy.submit(decision, Draft(k, signals[:k]))
        assert 0 <= k <= drafted
    n = tape.accepted(t, k)
    outcome = Outcome(k, n, min(n + 1, k), n + 1, level=context.level, signals=signals[:k].copy())
    outcome.context_length = context.context_length
    return decision, outcome, drafted


def fit_weights(tapes: list[Tape], seed: int = 0, steps: int = 1500) -> Weights:
    """MLP16 trained on causal records of these texts, by plain Adam."""
    x, y = records(tapes)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    z, rng = (x - mean) / scale, np.random.default_rng(seed)
    p = [rng.normal(size=(INPUTS, HIDDEN)) * 0.5, np.zeros(HIDDEN), rng.normal(size=(HIDDEN, 1)) * 0.1, np.zeros(1)]
    m, v = [np.zeros_like(a) for a in p], [np.zeros_like(a) for a in p]
    for i in range(1, steps + 1):
        rows = rng.integers(0, len(z), 128)
        h = np.maximum(z[rows] @ p[0] + p[1], 0.0)
        error = h @ p[2] + p[3] - y[rows, None]
        back = (error @ p[2].T) * (h > 0)
        gradients = [z[rows].T @ back, back.sum(0), h.T @ error, error.sum(0)]
        for a, g, mi, vi in zip(p, gradients, m, v, strict=True):
            g = g / len(rows)
            mi += 0.1 * (g - mi)
            vi += 0.001 * (g * g - vi)
            a -= 0.01 * (mi / (1 - 0.9**i)) / (np.sqrt(vi / (1 - 0.999**i)) + 1e-8)
    W1 = p[0] / scale[:, None]
    weights = Weights(W1, p[1] - mean @ W1, p[2], p[3])
    phi = np.column_stack([weights.hidden(x), np.ones(len(x))])
    return Weights(weights.W1, weights.b1, weights.W2, weights.b2, phi.T @ phi / len(phi))


@cache
def trained() -> Weights:
    """MLP16 fitted to twelve texts, once per test run."""
    return fit_weights(make_tapes(1, 12), steps=800)


def records(tapes: list[Tape]) -> tuple[np.ndarray, np.ndarray]:
    """Causal MLP16 inputs and acceptance rates for random gammas at every level, as profiling would collect."""
    rng, rows, labels = np.random.default_rng(7), [], []
    for code in range(3):
        for tape in tapes:
            history, t, end = History("nf4", "", 50), 0, len(tape.match) - MAX_GAMMA
            while t < end:
                c = history.context()
                k = int(rng.choice([1, 2, 4, 6, 8, 12, 16]))
                _, outcome, _ = step(Fixed(gamma=k), c, tape, t)
                signals = [c.mean_entropy, c.mean_confidence, c.max_entropy, c.min_confidence]
                rows.append([*signals, code, k])
                labels.append(outcome.accepted / k)
                history.update(outcome)
                t += outcome.produced
    return np.array(rows), np.array(labels)
