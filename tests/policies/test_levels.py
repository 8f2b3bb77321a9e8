"""What a learned policy sees of a compression level, and that it carries over to a level it never met."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import ARMS, Context, Outcome, Policy
from policies.costs.cost_model import CostModel, CostPrior
from policies.level_features import describe, level_bits
from policies.registry import make_policy
from speckv_online.models.levels import LEVELS

BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "nf4": 4.5, "fp4": 4.5, "q4_0": 4.5, "q4_1": 5, "q8_0": 8.5}
DESCRIBED = ("linucb:0", "lints:0")


@pytest.mark.parametrize("name", LEVELS)
def test_all_levels_have_bits(name: str) -> None:
    assert level_bits(name) == level_bits(f"{name}@8") == BITS[name]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("gptq-3bit", 3),
        ("hqq:nbits=2,group_size=64", 2),
        ("quanto:weights=int2@4", 2),
        ("bitsandbytes_4bit:bnb_4bit_use_double_quant=true", 4),
        ("awq:", 4),
        ("hqq:group_size=64", 4),
        ("hqq:axis=1", 4),
        ("bitsandbytes_4bit:llm_int8_skip_modules=[lm_head]", 4),
        ("bitsandbytes_4bit:bnb_4bit_compute_dtype=float16", 4),
        ("fbgemm_fp8:", 8),
        ("torchao:quant_type=int4_weight_only", 4),
        ("aqlm:nbits_per_codebook=16", 4),
        ("awq:w_bit=3", 3),
        ("quanto:weights=qint8", 8),
        ("torchao:int8_weight_only", 8),
        ("mystery", 16),
        ("", 16),
    ],
)
def test_bits_of_other_names(name: str, bits: float) -> None:
    assert level_bits(name) == bits


@pytest.mark.parametrize("times", [(0, 0, 0), (1, 0, 1), (9, 1, 1e9), (1, 1e-300, 1e300), (1, 2, 1)])
def test_descriptions_are_finite_and_of_order_one(times: tuple[float, float, float]) -> None:
    found = describe(4.0, *times)
    assert np.isfinite(found).all()
    assert 0 <= min(found) <= max(found) <= 4


def test_a_description_follows_the_measured_times() -> None:
    costs = CostModel()
    assert np.isfinite(costs.describe("never met")).all()
    costs.set_prior("int8", CostPrior(0.01, (0.1, 0.11), weight=1e6))
    assert costs.describe("int8") == pytest.approx((0.5, 0.1, 0.8), rel=1e-3)
    for i in range(600):
        k = i % 9
        costs.observe(Outcome(k, 0, 0, 1, 0.03 * k + 0.1, 0.03 * k, 0.1, "fp16"))
    bits, ratio, growth = costs.describe("fp16")
    assert (bits, ratio, growth) == (1.0, pytest.approx(0.3, rel=0.05), pytest.approx(0.0, abs=0.05))


def _taught(spec: str, accepted: dict[str, int], prior: dict[str, CostPrior]) -> Policy:
    """A policy that met levels, and at each of them ``accepted`` tokens of four in every step."""
    policy = make_policy(f"{spec},safety=off,weights=none" if spec.startswith("lin") else f"{spec},safety=off")
    for level, cost in prior.items():
        policy.set_costs(level, cost)
    for _ in range(300):
        for level, n in accepted.items():
            decision = policy.decide(Context(level=level))
            seconds = 0.1 + 0.01 * 4
            policy.learn(decision, Outcome(4, n, min(n + 1, 4), n + 1, seconds, 0.04, 0.1, level))
    return policy


def _expected(policy: Policy, level: str) -> float:
    """Accepted tokens that the policy expects of the arm 4 at a level."""
    context = Context(level=level)
    features = policy.features(context)
    return float((features[: len(policy.W)] @ policy.W + features[len(policy.W) :])[ARMS.index(4)])


@pytest.mark.parametrize("spec", DESCRIBED)
def test_what_was_learnt_carries_over_by_bits_and_times(spec: str) -> None:
    """Acceptance falls with the bits at three known levels; a level in between, never met, is expected in between."""
    prior = {name: CostPrior(0.01, (0.1, 0.1), weight=1e6) for name in ("fp16", "int8", "gptq-3bit", "gptq-6bit")}
    policy = _taught(spec, {"fp16": 4, "int8": 2, "gptq-3bit": 1}, prior)
    blind = _taught(f"{spec},levels=code", {"fp16": 4, "int8": 2, "gptq-3bit": 1}, prior)
    assert _expected(policy, "fp16") - _expected(policy, "gptq-3bit") > 1.5
    assert _expected(policy, "gptq-3bit") < _expected(policy, "gptq-6bit") < _expected(policy, "int8")
    # By its code alone such a level is the same as the known one with the nearest code.
    assert _expected(blind, "gptq-6bit") == _expected(blind, "int8")


@pytest.mark.parametrize("spec", DESCRIBED)
@pytest.mark.parametrize("level", ["", "hqq:nbits=1", "a-new-one-of-7-bits@16"])
def test_unknown_levels_are_decided_on(spec: str, level: str) -> None:
    policy = make_policy(f"{spec},safety=off")
    for n in (0, 4, 2):
        decision = policy.decide(Context(level=level))
        assert decision.gamma in ARMS
        assert np.isfinite(decision.features).all()
        policy.learn(decision, Outcome(4, n, min(n + 1, 4), n + 1, 0.1, 0.02, 0.08, level))
