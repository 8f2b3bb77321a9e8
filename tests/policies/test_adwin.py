"""ADWIN resets: learned policies return to what they started from when acceptance changes."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import Context, Outcome, PolicyError
from policies.registry import make_policy
from tests.support.tapes import trained

LEARNED = ("online", "linucb", "lints")


def feed(policy: object, hits: np.ndarray, start: int = 0) -> None:
    for i, hit in enumerate(hits.tolist()):
        decision = policy.decide(Context(level="nf4", step=start + i))  # type: ignore[attr-defined]
        signals = np.full((1, 4), 0.5)
        outcome = Outcome(1, int(hit), 1, 1 + int(hit), 0.06, 0.01, 0.05, "nf4", 100, 0, signals)
        policy.learn(decision, outcome)  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", LEARNED)
def test_a_change_of_acceptance_resets(spec: str) -> None:
    rng = np.random.default_rng(0)
    same, change = rng.random(600) < 0.9, rng.random(360) < 0.1
    policy = make_policy(f"{spec}:adwin=0.002,safety=off", weights=trained())
    start = policy.state_dict()
    feed(policy, same)
    assert policy.info()["resets"] == 0
    forget, forgot = policy.forget, []
    policy.forget = lambda: forgot.append(forget())
    feed(policy, change, 600)
    assert policy.info()["resets"] == len(forgot) > 0
    forget()
    again = policy.state_dict()
    for key in (k for k in start if not k.startswith("cost.")):
        np.testing.assert_allclose(again[key], start[key], err_msg=key)


def test_resets_are_off_by_default_and_checked() -> None:
    assert "resets" not in make_policy("online:safety=off").info()
    with pytest.raises(PolicyError, match="adwin must be"):
        make_policy("online:adwin=1.5")
    with pytest.raises(PolicyError, match="nothing here could be reset"):
        make_policy("mlp16:adwin=0.1")
