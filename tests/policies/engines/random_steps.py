"""Random steps, for the tests that hold a rule against a second reading of it."""

from __future__ import annotations

import numpy as np

from policies.base import CONFIDENCE, MAX_GAMMA, N_SIGNALS, Decision, Draft, Outcome, Policy

STEPS = 10_000


def drafted(rng: np.random.Generator, ease: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Signals of 16 tokens, and whether each would be accepted after those before it."""
    logit = ease + 2.5 * rng.normal(size=MAX_GAMMA)
    signals = np.zeros((MAX_GAMMA, N_SIGNALS))
    signals[:, CONFIDENCE] = 1.0 / (1.0 + np.exp(-logit - rng.normal(size=MAX_GAMMA)))
    signals[rng.random(MAX_GAMMA) < 0.01, CONFIDENCE] = rng.choice([0.0, 1.0])
    return signals, rng.random(MAX_GAMMA) < 1.0 / (1.0 + np.exp(-logit))


def accepted(match: np.ndarray, k: int) -> int:
    return k if match[:k].all() else int(match[:k].argmin())


def outcome(k: int, n: int, signals: np.ndarray, seconds: float = 0.0, level: str = "nf4") -> Outcome:
    return Outcome(k, n, min(n + 1, k), n + 1, seconds, 0.3 * seconds, 0.7 * seconds, level, 100, 0, signals[:k].copy())


def draft(policy: Policy, decision: Decision, signals: np.ndarray) -> int:
    """Tokens that are submitted, asked as a decoder asks."""
    k = 0
    while k < decision.gamma:
        k += 1
        if decision.ask_per_token and k < decision.gamma and not policy.proceed(decision, Draft(k, signals[:k])):
            break
    return policy.submit(decision, Draft(k, signals[:k])) if decision.ask_per_token and k else k
