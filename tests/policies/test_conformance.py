"""What every registered policy has to do, whatever it is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import MAX_GAMMA, Context, Decision, Policy, PolicyError
from policies.fixed import Fixed
from policies.guards.fault import FaultGuard
from policies.guards.safety import SafetyGuard
from policies.registry import BUILTIN, make_policy, policy_class
from policies.testing import Text, check_policy, take_step
from tests.support.tapes import Tape, make_tapes, play, trained

#: Options away from the defaults, two or more for each policy that has any.
VARIANTS = {
    "adaedl": ["adaedl:0.6,cap=4", "adaedl:target=0.5"],
    "autoregressive": [],
    "exp3spec": ["exp3spec:tokens_per_second,arms=1/3/7"],
    "fixed": ["fixed:0", "fixed:16"],
    "online": ["online:strength=50,discount=1,refresh=1,cap=5", "online:objective=tokens_per_step,safety=off"],
    "hf-confidence": ["hf-confidence:0.7,cap=3"],
    "hf-heuristic": ["hf-heuristic:2,transient=on"],
    "ik-autotune": ["ik-autotune:4,p_min=0.1,n_min=3"],
    "leviathan": ["leviathan:5,start=0.9", "leviathan:objective=tokens_per_step,arms=0/3/9"],
    "lints": ["lints:2,weights=none,discount=0.9", "lints:arms=2/5,safety=off"],
    "linucb": ["linucb:0,weights=none", "linucb:arms=0/1/16,ridge=1,refresh=1,safety=off"],
    "llamacpp": ["llamacpp:0.3,n_min=2,n_max=6"],
    "mlp16": ["mlp16:tokens_per_step", "mlp16:arms=2/4/6/8,cost_half_life=10"],
    "nightjar": ["nightjar:5", "nightjar:1,decay=0.5"],
    "onnx-genai": ["onnx-genai:1,cooldown=on", "onnx-genai:16"],
    "river": ["river:exp3", "river:thompson", "river:epsilon-greedy,epsilon=0.5", "river:linucb,arms=1/4"],
    "sglang": ["sglang:1,tiers=1/2/9"],
    "specdecpp": ["specdecpp:0.1,least=0,cap=5", "specdecpp:train=off"],
    "svip": ["svip:0.5,scale=0.3,cap=7"],
    "tapout": ["tapout:0.9,cap=5"],
    "tensorrt-gate": ["tensorrt-gate:6,window=10,threshold=0.6"],
    "ucbspec": ["ucbspec:tokens_per_second,delta=0.5,arms=0/5"],
    "vllm": ["vllm:8", "vllm:1,cost_half_life=20"],
    "vllm-table": ["vllm-table:1/4/3/9/32/1,most=2"],
}
SPECS = [spec for name in BUILTIN for spec in (name, *VARIANTS[name])]
#: Promises that a policy is known to break: river's objects have no arrays to restore.
KNOWN = {"river": ("restores",)}
SAVED = [spec for spec in SPECS if not spec.startswith("river")]


def build(spec: str, seed: int = 3, bare: bool = False) -> Policy:
    return make_policy(spec, bare=bare, seed=seed, weights=trained(), acceptance="none")


#: Those that come wrapped in the safety guard.
GUARDED = [spec for spec in SPECS if getattr(policy_class(spec), "guarded", False) and "safety=off" not in spec]


@cache
def tapes() -> tuple[Tape, ...]:
    return tuple(make_tapes(31, 3, 100))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert np.allclose(a[key], b[key], rtol=1e-9, atol=1e-9), key


def test_every_policy_has_variants() -> None:
    assert VARIANTS.keys() == BUILTIN.keys()


@pytest.mark.parametrize("spec", SPECS)
def test_promises_are_kept(spec: str) -> None:
    """Without a guard that would mend the answers."""
    check_policy(spec, skip=KNOWN.get(spec.partition(":")[0], ()), weights=trained(), acceptance="none")


@pytest.mark.parametrize("spec", GUARDED)
def test_promises_are_kept_within_the_safety_guard(spec: str) -> None:
    def guarded(seed: int) -> Policy:
        return build(spec, seed)

    assert isinstance(guarded(0), SafetyGuard)
    check_policy(guarded, skip=("pmf",))  # the guard's own choices have propensity 1


@pytest.mark.parametrize("spec", [spec for spec in SAVED if build(spec).take_delta()])
def test_sums_of_others_are_refused(spec: str) -> None:
    """What another policy handed out, or the same one that started from other arms or weights, adds up to nothing."""
    policy, name = build(spec), spec.partition(":")[0]
    before = {key: np.array(value) for key, value in policy.state_dict().items()}
    alike = {"lints": "linucb", "specdecpp": "online"}.get(name, name)  # sums of the same form, and of use
    others = [other for other in ("online", "linucb", "mlp16") if other not in (name, alike)]
    others += {"linucb": ["linucb:arms=0/2"], "lints": ["lints:arms=0/2"]}.get(name, [])
    for other in others:
        teacher = build(other)
        play(teacher, list(tapes())[:1])
        with pytest.raises(PolicyError):
            policy.merge(teacher.take_delta())
        same(policy.state_dict(), before)
    policy.merge({})


@pytest.mark.parametrize("spec", SAVED)
def test_a_broken_draft_leaves_no_trace(spec: str) -> None:
    """Signals that are no numbers, now and then: what is learnt stays finite, can be saved, merged and used."""
    policy, rng = FaultGuard(build(spec)), np.random.default_rng(8)
    broken = []
    for tape in tapes():
        signals = tape.signals.copy()
        signals[rng.random(len(signals)) < 0.05] = np.nan
        broken.append(Tape(tape.match, signals))
    play(policy, broken)
    assert set(policy.faults) <= {"signals that are no numbers"}
    state, delta = policy.state_dict(), policy.take_delta()
    assert all(np.isfinite(np.asarray(value, dtype=float)).all() for value in (*state.values(), *delta.values()))
    other = build(spec)
    other.merge(delta)
    other.load_state_dict(state)


contexts = st.builds(
    Context,
    level=st.sampled_from(["fp16", "int8", "nf4", "fp32", "awq-4bit", "odd"]),
    task=st.sampled_from(["", "code"]),
    step=st.integers(0, 500),
    position=st.integers(0, 4000),
    context_length=st.integers(1, 100_000),
    max_gamma=st.integers(0, MAX_GAMMA),
    last_drafted=st.integers(0, MAX_GAMMA),
    last_accepted=st.integers(0, MAX_GAMMA),
    acceptance=st.floats(0, 1),
    mean_entropy=st.floats(0, 16),
    mean_confidence=st.floats(0, 1),
    max_entropy=st.floats(0, 16),
    min_confidence=st.floats(0, 1),
)
tokens = st.tuples(st.floats(0, 16), st.floats(0, 1), st.floats(0, 200), st.integers(-4, 4))


flags = st.lists(st.booleans(), min_size=16, max_size=16)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(contexts, st.lists(tokens, min_size=16, max_size=16), flags), max_size=6))
def test_no_impossible_decision(spec: str, steps: list) -> None:
    """Whatever the context and the signals, whatever comes of it: legal answers, of the policy itself."""
    policy = _reused(spec)
    for context, rows, matches in steps:
        context.last_accepted = min(context.last_accepted, context.last_drafted)
        policy.learn(*take_step(policy, context, Text(np.array(matches), np.array(rows))))


@cache
def _reused(spec: str) -> Policy:
    return build(spec, bare=True)


class Random(Fixed):
    """Uniform over the default arms."""

    def decide(self, context: Context) -> Decision:
        gamma = int(self.rng.choice([0, 1, 2, 4, 6, 8, 12, 16]))
        return Decision(self.new_id(), min(gamma, context.max_gamma))


LEARNED = ["online", "linucb", "lints", "leviathan"]


@cache
def random_goodput(level: str) -> float:
    return play(Random(seed=1), make_tapes(41, 6), level).goodput


@pytest.mark.parametrize("level", ["fp16", "int8", "nf4"])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_policies_beat_chance(name: str, level: str) -> None:
    assert play(build(name), make_tapes(41, 6), level).goodput > 1.1 * random_goodput(level)


@pytest.mark.parametrize("level", ["fp16", "int8", "nf4"])
def test_online_beats_every_fixed_gamma(level: str) -> None:
    """Gamma 0 included, and from a cold start: where nothing pays it may lose what its probes cost."""
    texts = make_tapes(43, 20)
    best = max(play(Fixed(gamma=g), texts, level).goodput for g in (0, 1, 2, 3, 4, 6))
    assert play(build("online"), texts, level).goodput > (0.985 if level == "fp16" else 1.03) * best
