"""Rules of other engines against a second reading of their formulas, 10,000 random steps each: the same decisions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies.base import CONFIDENCE, MAX_GAMMA, N_SIGNALS, Context
from policies.baselines.engines.hf import Confidence, Heuristic
from policies.baselines.engines.ik_llama import IkAutotune
from policies.baselines.engines.llamacpp import LlamaCpp
from policies.baselines.engines.onnx_genai import OnnxGenAi
from policies.baselines.engines.sglang import SgLang
from policies.baselines.engines.tensorrt_llm import TensorRtGate
from policies.baselines.engines.vllm import VllmAdaptive
from policies.baselines.engines.vllm_table import VllmTable
from policies.costs.cost_model import CostPrior
from tests.policies.engines.random_steps import STEPS, accepted, draft, drafted, outcome
from tests.policies.engines.readings import IkReading, OnnxReading, SgLangReading, VllmReading


@pytest.mark.parametrize("gamma", [1, 4, 7])
def test_vllm(gamma: int) -> None:
    rng, policy, reading = np.random.default_rng(gamma), VllmAdaptive(gamma=gamma), VllmReading(gamma)
    policy.set_costs("nf4", CostPrior(0.05, (1.0, 1.3, 1.25, 1.9, 2.2), first_draft_seconds=0.1, weight=1e6))
    costs, context = policy.costs.level("nf4"), Context()
    lengths = set()
    for i in range(STEPS):
        if i % 37 == 0:
            context, reading.stale = Context(level="nf4"), [1.0] * gamma
        context.max_gamma = int(rng.integers(0, MAX_GAMMA + 1)) if rng.random() < 0.2 else MAX_GAMMA
        signals, match = drafted(rng, math.sin(i / 500))
        if i // 1000 % 3 == 2:
            match = rng.random(MAX_GAMMA) < 1.0 - signals[:, CONFIDENCE]  # confidence misleads for a while
        decision = policy.decide(context)
        assert decision.gamma == min(gamma, context.max_gamma)
        k = draft(policy, decision, signals)
        reading.draft(signals[: decision.gamma, CONFIDENCE].tolist())
        assert k == reading.budget(costs.first + decision.gamma * costs.draft, costs.verify.tolist()), i
        n = accepted(match, k)
        policy.learn(decision, outcome(k, n, signals))
        reading.grade(k, n)
        lengths.add(k)
    assert policy.weights == pytest.approx([reading.w, *reading.b], rel=1e-6)
    assert len(lengths) >= max(gamma, 2)
    assert reading.refits == 100
    assert reading.dropped  # negative slopes were met


def test_vllm_counts_the_steps_of_a_batch_once() -> None:
    """Three sequences of a batch of up to four: a hundred steps, and the refit comes with the next decision."""
    policy = VllmAdaptive(gamma=2)
    contexts = [Context(level="nf4@4") for _ in range(3)]
    signals = np.full((2, N_SIGNALS), 0.6)
    for _ in range(100):
        decisions = [policy.decide(context) for context in contexts]
        assert policy.weights.tolist() == [0.5, -0.2, -0.2]
        for decision in decisions:
            policy.learn(decision, outcome(2, 1, signals, level="nf4@4"))
    policy.decide(contexts[0])
    assert policy.weights[1] > -0.2 > policy.weights[2]


@pytest.mark.parametrize("transient", [False, True])
def test_heuristic(transient: bool) -> None:
    rng, policy, number = np.random.default_rng(1), Heuristic(transient=transient), 5
    for i in range(STEPS):
        if i % 50 == 0:
            policy.begin(Context())
            number = 5 if transient else number
        limit = int(rng.choice([0, 3, MAX_GAMMA]))
        signals, match = drafted(rng, 1.5)
        decision = policy.decide(Context(max_gamma=limit))
        k = min(number, limit)
        assert decision.gamma == k
        n = accepted(match, k)
        number = number + 2 if n == k else max(1, number - 1)
        policy.learn(decision, outcome(k, n, signals))
    assert policy.gamma == number


def test_confidence() -> None:
    rng, policy = np.random.default_rng(2), Confidence()
    probs: list[float] = []
    labels: list[int] = []
    threshold, thresholds = 0.4, set()
    for i in range(STEPS):
        if i % 40 == 0:
            policy.begin(Context())
            probs, labels, threshold = [], [], 0.4
        signals, match = drafted(rng)
        decision = policy.decide(Context(max_gamma=12))
        k = draft(policy, decision, signals)
        q = signals[:12, CONFIDENCE].tolist()
        assert k == next((j + 1 for j in range(12) if q[j] < threshold), 12), i
        n = accepted(match, k)
        policy.learn(decision, outcome(k, n, signals))
        probs += q[: min(n + 1, k)]
        labels += ([1] * n + [0])[: min(n + 1, k)]
        if len(probs) > 5 and set(labels) == {0, 1}:
            p, y = np.array(probs), np.array(labels)
            cuts = [math.inf, *sorted(set(probs), reverse=True)]
            cost = [(p[y == 0] >= c).mean() + 3 * (1 - (p[y == 1] >= c).mean()) for c in cuts]
            threshold = cuts[cost.index(min(cost))]
        assert policy.threshold == threshold, i
        thresholds.add(threshold)
    assert len(thresholds) > 900


def test_llamacpp() -> None:
    rng, kept = np.random.default_rng(3), set()
    for _ in range(STEPS):
        n_max = int(rng.integers(1, MAX_GAMMA + 1))
        p_min, n_min, limit = float(rng.random()), int(rng.integers(0, n_max + 1)), int(rng.integers(0, MAX_GAMMA + 1))
        signals, _ = drafted(rng, 2.0)
        policy = LlamaCpp(p_min=p_min, n_min=n_min, n_max=n_max)
        decision = policy.decide(Context(max_gamma=limit))
        run: list[float] = []
        for q in signals[: min(n_max, limit), CONFIDENCE].tolist():
            if q < p_min:
                break
            run.append(q)
        want = len(run) if len(run) >= n_min else 0
        assert draft(policy, decision, signals) == want
        kept.add(want)
    assert len(kept) == MAX_GAMMA + 1


def test_sglang() -> None:
    """Batches of changing sizes; the rows of one step learn one by one."""
    rng, policy, reading = np.random.default_rng(4), SgLang(), SgLangReading()
    seen = set()
    for i in range(STEPS):
        size = int(rng.choice([1, 1, 2, 4, 8, 16, 32, 64, 128]))
        rows = size if rng.random() < 0.5 else size // 2 + 1  # the size in the name is rounded up
        level = "nf4" if size == 1 else f"nf4@{size}"
        ease = 4.0 * math.sin(i / 300 + size)
        decisions = [policy.decide(Context(level=level)) for _ in range(rows)]
        want = reading.now[reading.key(size)]
        assert {d.gamma for d in decisions} == {want}, i
        seen.add((reading.key(size), want))
        lengths = []
        for decision in decisions:
            n = min(int(rng.geometric(1.0 / (1.0 + math.exp(ease))) - 1), want)
            lengths.append(n)
            policy.learn(decision, outcome(want, n, np.zeros((MAX_GAMMA, N_SIGNALS)), level=level))
        reading.update(size, lengths)
    tiers = [(b, tier) for b, (tiers, _) in SgLangReading.CONFIG.items() for tier in tiers]
    assert seen == set(tiers)


def test_ik_autotune() -> None:
    rng, policy = np.random.default_rng(5), IkAutotune(seed=9, worker=2)
    reading = IkReading(np.random.default_rng([9, 2]))
    for i in range(STEPS):
        limit = int(rng.integers(0, MAX_GAMMA + 1)) if rng.random() < 0.1 else MAX_GAMMA
        signals, match = drafted(rng, 2.0 * math.sin(i / 400))
        decision = policy.decide(Context(max_gamma=limit))
        n_max, p_min, n_min = reading.propose()
        assert decision.gamma == min(n_max, limit), i
        k = draft(policy, decision, signals)
        want = 0
        for j in range(min(n_max, limit)):
            if signals[j, CONFIDENCE] < p_min and j:
                break
            want += 1
            if signals[j, CONFIDENCE] < p_min:
                break
        assert k == (want if want >= n_min else 0), i
        n = accepted(match, k)
        pace = 1000.0 if i % 2500 > 2000 else 1.0  # a slow stretch now and then: the tuner starts anew
        seconds = 5e-5 if rng.random() < 0.01 else pace * float(rng.uniform(0.9, 1.1)) * (0.1 + 0.02 * k)
        policy.learn(decision, outcome(k, n, signals, seconds))
        if k:
            reading.feedback(n, seconds)
    assert [c.best for c in policy.coordinates] == reading.best
    assert policy.resets == reading.resets > 0


@pytest.mark.parametrize(("least", "cooldown"), [(1, True), (2, False), (4, True)])
def test_onnx_genai(least: int, cooldown: bool) -> None:
    rng, policy = np.random.default_rng(least), OnnxGenAi(least=least, cooldown=cooldown)
    seen: set[int] = set()
    for i in range(STEPS):
        if i % 100 == 0:
            context, reading, rate = Context(level="nf4"), OnnxReading(least), rng.uniform(0.0, 0.12)
        context.max_gamma = int(rng.integers(0, MAX_GAMMA + 1)) if rng.random() < 0.05 else MAX_GAMMA
        signals, match = drafted(rng, 6.0 * math.sin(i / 60))
        decision = policy.decide(context)
        want = min(reading.k, context.max_gamma)
        if cooldown and reading.skip:
            want, reading.skip = 0, False
        assert decision.gamma == want, i
        seen.add(want)
        n = accepted(match, want)
        seconds = float(rng.uniform(0.95, 1.05)) * (0.1 + rate * want)
        policy.learn(decision, outcome(want, n, signals, seconds))
        reading.round(want, n, 1000.0 * seconds)
    assert len(seen) > 10


def test_tensorrt_gate() -> None:
    """A gate of 20 steps that closes at different times: 100 runs of 100 steps of a batch of up to four."""
    rng, closed = np.random.default_rng(6), []
    for run in range(100):
        threshold = float(rng.uniform(0.1, 0.6))
        policy, rates, off = TensorRtGate(gamma=5, window=20, threshold=threshold), list[float](), -1
        for i in range(STEPS // 100):
            decisions = [policy.decide(Context(level="nf4@4", max_gamma=int(rng.choice([0, 2, 9])))) for _ in range(3)]
            assert all(d.gamma == 0 for d in decisions) or off < 0, (run, i)
            drafts = [d.gamma for d in decisions]
            lengths = [accepted(drafted(rng, 1.0 - i / 60)[1], k) for k in drafts]
            for decision, k, n in zip(decisions, drafts, lengths, strict=True):
                policy.learn(decision, outcome(k, n, np.zeros((MAX_GAMMA, N_SIGNALS)), level="nf4@4"))
            if sum(drafts):
                rates.append(sum(lengths) / sum(drafts))
            if off < 0 and len(rates) >= 20 and np.mean(rates[-20:]) < threshold:
                off = i
        policy.decide(Context(level="nf4@4"))
        assert policy.closed == (off >= 0)
        closed.append(off)
    assert len(set(closed)) > 10
    assert -1 in closed


def test_vllm_table() -> None:
    """Every size of random tables, gaps and tails included, by a dense list as long as the largest batch."""
    rng = np.random.default_rng(7)
    for _ in range(STEPS // 128):
        ends = np.sort(rng.choice(np.arange(1, 100), size=2 * int(rng.integers(1, 5)), replace=False)).tolist()
        ranges = [[a, b, int(rng.integers(0, 9))] for a, b in zip(ends[::2], ends[1::2], strict=True)]
        ranges[0][0] = 1
        most = int(rng.integers(1, 9))
        dense = [-1] * 129
        for first, last, k in ranges:
            dense[first : last + 1] = [min(k, most)] * (last + 1 - first)
        for size in range(2, 129):
            dense[size] = dense[size - 1] if dense[size] < 0 else dense[size]
        order = rng.permutation(len(ranges))
        policy = VllmTable(table=tuple(number for i in order for number in ranges[i]), most=most)
        sizes = range(1, 129)
        assert [policy.decide(Context(level=f"int8@{size}")).gamma for size in sizes] == dense[1:]
    assert VllmTable().decide(Context(level="fp16")).gamma == 5
    assert VllmTable().decide(Context(level="fp16@256", max_gamma=3)).gamma == 0
