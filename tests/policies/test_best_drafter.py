"""The policy that chooses a drafter: it finds the best one per level, and its statistics add up."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import N_SIGNALS, Context, Decision, Outcome, PolicyError
from policies.learned.best_drafter import BestDrafter
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.hybrid import HybridDrafter
from tests.support.decoding import plain
from tests.support.lookups import REPEATING
from tests.support.tiny_models import TinyPair

NAMES = ("hybrid", "model", "ngram")


def play(policy: BestDrafter, level: str, best: str, steps: int, seed: int = 0) -> list[tuple[Decision, Outcome]]:
    """Steps whose tokens are the same with every drafter, and whose seconds are less with one."""
    rng, found = np.random.default_rng(seed), []
    context = Context(level=level, drafters=NAMES)
    policy.begin(context)
    for _ in range(steps):
        decision = policy.decide(context)
        n = int(rng.integers(0, 3))
        seconds = (1.0 if decision.drafter == best else 1.3) * rng.uniform(0.8, 1.2)
        outcome = Outcome(
            2, n, min(n + 1, 2), n + 1, seconds, 0.1, 0.5, level, signals=np.zeros((2, N_SIGNALS)),
            drafter=decision.drafter,
        )  # fmt: skip
        policy.learn(decision, outcome)
        policy.learn(decision, outcome)  # a second time changes nothing
        found.append((decision, outcome))
    return found


def test_it_finds_the_best_drafter_of_each_level() -> None:
    policy = BestDrafter(policy="fixed/2", seed=1)
    for level, best in (("fp16", "ngram"), ("nf4", "model")):
        drafters = [d.drafter for d, _ in play(policy, level, best, 1500)]
        assert set(drafters[:100]) == set(NAMES)
        assert drafters[-600:].count(best) > 400
        assert all(d.gamma == 2 for d, _ in play(policy, level, best, 3))


@pytest.mark.parametrize("block", [12, 900])
def test_each_drafter_is_tried_for_one_block(block: int) -> None:
    """Older steps count less, so that no block adds up to its length: of 900 steps the first drafter never let go."""
    policy = BestDrafter(policy="fixed/2", block=block, seed=1)
    drafters = [d.drafter for d, _ in play(policy, "fp16", "ngram", 3 * block)]
    assert drafters == [name for name in NAMES for _ in range(block)]


def test_a_stall_is_not_held_against_a_drafter_for_ever() -> None:
    policy = BestDrafter(policy="fixed/2", seed=1)
    play(policy, "fp16", "ngram", 600)
    stalled = Outcome(2, 1, 2, 2, 3600.0, 0.1, 0.5, "fp16", signals=np.zeros((2, N_SIGNALS)), drafter="ngram")
    policy.learn(Decision(10**9, 2, drafter="ngram"), stalled)
    assert [d.drafter for d, _ in play(policy, "fp16", "ngram", 600)].count("ngram") > 300


def test_sums_that_are_refused_leave_no_trace() -> None:
    one, other = BestDrafter(policy="goodput", seed=1), BestDrafter(policy="online", seed=1)
    play(other, "fp16", "ngram", 60)
    before = one.state_dict()
    for call, sums in ((one.merge, other.take_delta()), (one.load_state_dict, other.state_dict())):
        with pytest.raises(PolicyError):
            call(sums)
        assert not [key for key in one.state_dict() if key.startswith("rates/")]
    assert one.state_dict().keys() == before.keys()


def test_drafters_are_drawn_by_chance_of_their_own() -> None:
    policies = [BestDrafter(policy="lints", seed=1, worker=w) for w in range(3)]
    for policy in policies:
        policy.begin(Context(drafters=NAMES))
    streams = [p.rng for p in policies] + [copy.rng for p in policies for copy in p.inner.values()]
    assert len({rng.random() for rng in streams}) == len(streams)


def test_statistics_round_trip_and_add_up() -> None:
    one, other, whole = (BestDrafter(policy="leviathan", seed=1, worker=w) for w in range(3))
    play(one, "fp16", "ngram", 60)
    before = one.state_dict()
    again = BestDrafter(policy="leviathan", seed=1)
    again.load_state_dict(before)
    assert before.keys() == again.state_dict().keys()
    for key, value in again.state_dict().items():
        np.testing.assert_allclose(value, before[key])
    play(other, "fp16", "ngram", 60, seed=1)
    whole.merge(one.take_delta())
    whole.merge(other.take_delta())
    assert not [key for key in one.take_delta() if key.startswith("rates/")]
    counts = {name: whole.state_dict()[f"rates/fp16/{name}"][0] for name in NAMES}
    assert sum(counts.values()) == pytest.approx(2 * 55, rel=0.1)  # all but the first step of each block
    assert len({d.id for p in (one, other) for d, _ in play(p, "fp16", "ngram", 40)}) == 80


def test_merged_rates_are_those_of_one_process() -> None:
    """Many steps at another speed, merged at once, weigh as much as if they had been taken here."""
    scratch = BestDrafter(policy="fixed/2", seed=1)
    first, then = play(scratch, "fp16", "model", 300), play(scratch, "fp16", "ngram", 1500)
    here, there, whole = (BestDrafter(policy="fixed/2") for _ in range(3))
    for policy, steps in ((here, first), (there, then), (whole, first + then)):
        for decision, outcome in steps:
            policy.learn(decision, outcome)
    here.merge(there.take_delta())
    for name in NAMES:
        key = f"rates/fp16/{name}"
        assert here.state_dict()[key] == pytest.approx(whole.state_dict()[key], rel=1e-9)


def test_what_is_loaded_is_not_handed_out() -> None:
    policy = BestDrafter(policy="fixed/2", seed=1)
    play(policy, "fp16", "model", 100)
    policy.load_state_dict(policy.state_dict())
    assert not policy.take_delta()
    for call in (policy.merge, policy.load_state_dict):
        with pytest.raises(PolicyError, match="not of best-drafter"):
            call({"head.sums": np.zeros(3)})


def test_with_one_drafter_it_is_the_inner_policy(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(
        tiny_pair.drafter(), policy=make_policy("best-drafter:fixed/3"), target=tiny_pair.target
    )
    out = decoder.generate(REPEATING, 20)
    assert {s.gamma for s in out.steps} <= {0, 1, 2, 3}
    assert not decoder.policy.faults


def test_defaults_reach_the_inner_policies() -> None:
    """A comparison names weights of its own folds for every policy that takes any; a spec's own come first."""
    cold = make_policy("goodput", acceptance="none").acceptance_model.weights("nf4")
    for spec in ("best-drafter", "best-drafter:policy=goodput/acceptance=none"):
        policy = make_policy(spec, acceptance="none" if spec == "best-drafter" else "no such file")
        assert policy._copy("ngram").acceptance_model.weights("nf4") == cold
    with pytest.raises(PolicyError, match="no npz"):
        make_policy("best-drafter", acceptance="no such file")


def test_it_stays_lossless(tiny_pair: TinyPair) -> None:
    policy = make_policy("best-drafter:leviathan,block=3")
    decoder = SpeculativeDecoder(HybridDrafter(tiny_pair.draft, 260), policy=policy, target=tiny_pair.target)
    for _ in range(2):
        assert decoder.generate(REPEATING, 40).tokens == plain(tiny_pair.target, REPEATING, 40)
    assert not decoder.policy.faults
    assert {name for name in policy.inner if name} == set(NAMES)


def test_mistakes_are_named() -> None:
    for spec in ("best-drafter:best-drafter", "best-drafter:nothing", "best-drafter:block=1"):
        with pytest.raises(PolicyError, match="best-drafter"):
            make_policy(spec)
