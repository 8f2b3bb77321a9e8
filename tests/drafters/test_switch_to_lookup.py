"""Leaving the model for the lookup within a step: lossless, replayed exactly, worth it where forwards are dear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from transformers import PreTrainedModel

from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Draft, Outcome, Policy
from policies.costs.prior import CostPrior
from policies.fixed import Autoregressive
from policies.guards.fault import FaultGuard
from policies.guards.safety import SafetyGuard
from policies.learned.online import Online
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.fingerprint import drafter_fingerprint
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.errors import UserError
from speckv_online.lookup.gate import Gate
from speckv_online.modeling.sampling import Sampler
from speckv_online.models.pairs import LoadedPair, chat_prompt
from speckv_online.profiling.trace_collection import collect_trace, redraft
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.hindsight import clairvoyant, dynamic_programming_bound
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace
from tests.support.lookups import REPEATING, gate_that
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama

PROMPTS = (REPEATING, REPEATING[3:], [7, 7, 9, 7, 7, 9, 7, 3, 5])
DEAR = CostTable("dear", {"fp32": LevelCost(0.05, (0.1, 0.1), 0.001, catch_up_seconds=1e-4, first_draft_seconds=0.002)})


class Turner(Policy):
    """Turns to the lookup at random, before or within a draft, wherever there is one; notes what it is told.

    Asked to proceed once it has turned, it raises, except where a decision before the draft wanted that.
    """

    learns = True

    def __init__(self, seed: int = 0, always: bool = False) -> None:
        super().__init__(seed=seed)
        self.always, self.told, self.outcomes = always, list[tuple](), list[Outcome]()
        self.switched = set[int]()

    def note(self, drafted: int, lookups: Sequence[float], alternative: float) -> None:
        self.told.append((drafted, [round(p, 5) for p in lookups], round(alternative, 5)))

    def switches(self) -> bool:
        return self.always or self.rng.random() < 0.3

    def decide(self, context: Context) -> Decision:
        self.note(0, [context.lookup_confidence], context.lookup_alternative)
        switches = context.lookup_alternative > 0.0 and self.switches()
        gamma = int(self.rng.integers(0, context.max_gamma + 1))
        asks = not switches or bool(self.rng.random() < 0.5)
        drafter = LOOKUP if switches else ""
        return Decision(self.new_id(), gamma, ask_per_token=asks, drafter=drafter, ask_at_submit=not asks)

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        self.note(draft.drafted, draft.lookups, draft.lookup_alternative)
        assert decision.id not in self.switched
        if draft.lookup_alternative and self.switches():
            self.switched.add(decision.id)
            return LOOKUP
        return bool(self.rng.random() < 0.9)

    def submit(self, decision: Decision, draft: Draft) -> int:
        drafted = draft.drafted
        assert drafted == len(draft.tokens) == len(draft.signals)
        self.note(drafted, draft.lookups[:drafted], draft.lookup_alternative)
        return drafted - int(self.rng.random() < 0.1)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def drafters(pair: TinyPair) -> dict[str, ModelDrafter]:
    draft = perturbed(pair.target, 0.15)
    return {
        "model": ModelDrafter(draft, 260),
        "always asked": HybridDrafter(draft, 260, gate=gate_that(False, 0.4), skip=1.0),
        "sometimes asked": HybridDrafter(draft, 260, skip=0.6),
        "lookups preferred": HybridDrafter(draft, 260, gate=gate_that(True, 0.4), skip=0.5),
        "as shipped": HybridDrafter(draft, 260),
    }


KINDS = ("model", "always asked", "sometimes asked", "lookups preferred", "as shipped")


def facts(outcome: Outcome) -> tuple:
    o = outcome
    return o.drafted, o.accepted, o.labelled, o.produced, o.forwards, o.exhausted


#: What was traced already, by the drafter's fingerprint: a trace takes longer than what is done with it.
TRACED: dict[str, list[Trace]] = {}


def traced(pair: TinyPair, drafter: Drafter) -> list[Trace]:
    key = drafter_fingerprint(drafter)
    if key not in TRACED:
        TRACED[key] = [
            collect_trace(pair.target, drafter, p, 30, level="fp32", task="chat", eos_ids=())[0] for p in PROMPTS
        ]
    return TRACED[key]


def turns_alike(target: PreTrainedModel, drafter: Drafter, traces: list[Trace]) -> None:
    real, replayed = Turner(seed=3), Turner(seed=3)
    decoder = SpeculativeDecoder(drafter, policy=real, target=target, level="fp32")
    simulator, switches = Simulator(replayed, DEAR), 0
    for trace in traces:
        out = decoder.generate(trace.prompt.tolist(), trace.budget, task="chat", eos_ids=())
        replay = simulator.replay(trace)
        assert out.tokens == trace.tokens.tolist()
        assert [s.drafted for s in out.steps] == replay.drafted.tolist()
        assert real.told == replayed.told
        for one, other in zip(real.outcomes, replayed.outcomes, strict=True):
            assert facts(one) == facts(other)
            np.testing.assert_allclose(one.signals, other.signals, atol=1e-3, rtol=1e-4)
        switches += sum(0 < o.forwards < o.drafted or o.drafter == LOOKUP for o in real.outcomes)
    assert not decoder.policy.faults
    assert not simulator.policy.faults
    assert switches > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_turns_as_the_decoder_does(tiny_pair: TinyPair, kind: str) -> None:
    drafter = drafters(tiny_pair)[kind]
    turns_alike(tiny_pair.target, drafter, traced(tiny_pair, drafter))


def goodput_alike(target: PreTrainedModel, drafter: Drafter, traces: list[Trace]) -> int:
    """Return how many tokens were looked up."""
    found = 0
    for trace in traces:
        real, replayed = (told_costs(Online(acceptance="none")) for _ in range(2))
        for policy in (real, replayed):
            policy.costs.observe = lambda outcome: None  # type: ignore[method-assign]  # not what the clock says
        decoder = SpeculativeDecoder(drafter, policy=real, target=target, level="fp32")
        out = decoder.generate(trace.prompt.tolist(), trace.budget, eos_ids=())
        replay = Simulator(replayed, DEAR).replay(trace)
        assert [(s.drafted, s.accepted) for s in out.steps] == list(
            zip(replay.drafted.tolist(), replay.accepted.tolist(), strict=True)
        )
        found += sum(max(s.drafted - s.forwards, 0) for s in out.steps)
    return found


def test_goodput_decides_alike_on_traces_and_models(tiny_pair: TinyPair) -> None:
    drafter = drafters(tiny_pair)["always asked"]
    assert goodput_alike(tiny_pair.target, drafter, traced(tiny_pair, drafter)) > 5


@pytest.mark.slow
def test_both_turn_alike_on_the_real_pair(real_pair: LoadedPair) -> None:
    target, drafter = real_pair.target, real_pair.drafter
    texts = ("Write the numbers from 1 to 9 three times, one a line.", "Say 'to be or not to be' four times.")
    prompts = [chat_prompt(real_pair.tokenizer, text) for text in texts]
    traces = [collect_trace(target, drafter, p, 40, level="fp32", eos_ids=())[0] for p in prompts]
    turns_alike(target, drafter, traces)
    assert goodput_alike(target, drafter, traces) > 5


def told_costs(policy: Online) -> Online:
    policy.set_costs("fp32", CostPrior(0.05, (0.1, 0.1), 0.001))
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_turning_changes_no_token(tiny_pair: TinyPair, kind: str) -> None:
    drafter, plain = (
        drafters(tiny_pair)[kind],
        SpeculativeDecoder(None, policy=Autoregressive(), target=tiny_pair.target),
    )
    wanted = [plain.generate(p, 30, eos_ids=()).tokens for p in PROMPTS]
    for seed in range(2):
        policy = Turner(seed=seed)
        decoder = SpeculativeDecoder(drafter, policy=policy, target=tiny_pair.target)
        assert [decoder.generate(p, 30, eos_ids=()).tokens for p in PROMPTS] == wanted
        assert [g.tokens for g in decoder.decode_batch(list(PROMPTS), 30, eos_ids=())] == wanted
        assert not decoder.policy.faults
        assert any(0 < o.forwards < o.drafted for o in policy.outcomes)
        assert all(o.forwards <= o.drafted + 1 for o in policy.outcomes)


@pytest.mark.parametrize("kind", ["model", "hybrid"])
def test_sampling_with_turns_follows_the_target(kind: str) -> None:
    """The first two tokens of many short runs, the second drafted by the lookup after one of the model's."""
    vocab, n = 5, 400
    target = tiny_llama(vocab=vocab, layers=1)
    target.lm_head.weight.data.mul_(0.3)
    draft = perturbed(target, 0.4)
    hybrid = HybridDrafter(draft, vocab, gate=gate_that(False, 0.4), skip=1.0)
    drafter = hybrid if kind == "hybrid" else ModelDrafter(draft, vocab)
    prompt = [1, 2, 3, 4, 1, 2, 4, 3, 1, 2]
    truth = SpeculativeDecoder(None, policy=Autoregressive(), target=target)
    policy, sampler = Middle(), Sampler(seed=5)
    decoder = SpeculativeDecoder(drafter, policy=policy, target=target)
    seen, plain = np.zeros((vocab, vocab)), np.zeros((vocab, vocab))
    for i in range(n):
        a, b = decoder.generate(prompt, 3, eos_ids=(), sampler=sampler).tokens[:2]
        seen[a, b] += 1
        a, b = truth.generate(prompt, 2, eos_ids=(), sampler=Sampler(seed=1000 + i)).tokens
        plain[a, b] += 1
    assert policy.switched > n / 2
    both = seen + plain
    chi2 = ((seen - plain) ** 2 / np.maximum(both, 1.0)).sum()
    assert chi2 < 24 + 5 * np.sqrt(48)  # mean 24, standard deviation √48 where both are drawn alike


class Middle(Policy):
    """Drafts two tokens, the second by the lookup."""

    switched = 0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 2, ask_per_token=True, features=context)

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        self.switched += 1
        return LOOKUP


def test_nothing_is_offered_where_there_is_no_choice(tiny_pair: TinyPair) -> None:
    drawn = Sampler(seed=1)
    for drafter, sampler in product((NgramDrafter(), HybridDrafter(tiny_pair.draft, 260, skip=0.0)), (None, drawn)):
        policy = Turner()
        decoder = SpeculativeDecoder(drafter, policy=policy, target=tiny_pair.target)
        decoder.generate(REPEATING, 20, eos_ids=(), sampler=sampler)
        decoder.decode_batch(
            [REPEATING, PROMPTS[1]], 20, eos_ids=(), samplers=None if sampler is None else [drawn, drawn]
        )
        assert policy.told
        assert not any(lookup_alternative for _, _, lookup_alternative in policy.told)


def test_an_unknown_drafter_within_a_step_is_a_fault_and_ends_the_draft(tiny_pair: TinyPair) -> None:
    class Lost(Policy):
        def decide(self, context: Context) -> Decision:
            return Decision(self.new_id(), 4, ask_per_token=True)

        def proceed(self, decision: Decision, draft: Draft) -> bool | str:
            return "oracle"

    guard = FaultGuard(Lost())
    drafter = HybridDrafter(tiny_pair.draft, 260)
    decoder = SpeculativeDecoder(drafter, policy=guard, target=tiny_pair.target)
    out = decoder.generate(REPEATING, 12, eos_ids=())
    assert {s.drafted for s in out.steps} <= {0, 1}
    assert guard.faults["impossible answer"] > 0
    assert len(out.tokens) == 12


def policy_of(draft: float, verify: tuple[float, ...]) -> Online:
    policy = Online(acceptance="none")
    policy.set_costs("nf4", CostPrior(draft, verify))
    return policy


def test_goodput_turns_where_a_forward_does_not_pay() -> None:
    for draft, lookup_alternative, gamma, drafter in (
        (0.2, 0.0, 0, ""), (0.2, 0.3, 16, LOOKUP), (0.2, 0.01, 0, ""), (0.001, 0.1, 16, ""), (0.001, 0.9, 16, LOOKUP),
    ):  # fmt: skip
        decision = policy_of(draft, (0.1, 0.105)).decide(Context(level="nf4", lookup_alternative=lookup_alternative))
        assert (decision.gamma, decision.drafter) == (gamma, drafter), (draft, lookup_alternative)


def test_goodput_turns_within_a_step_and_prices_what_follows() -> None:
    policy = policy_of(0.03, (0.1, 0.105))
    table = np.array([[0.1, 0.97, 9.0, 3.0], [5.0, 0.03, 0.1, -3.0], *[[1.0, 0.4, 1.0, 2.0]] * 14])
    context = Context(level="nf4", acceptance=0.9, mean_confidence=0.95)
    decision = policy.decide(context)
    assert decision.drafter == ""
    # The first token is all but sure, and so is what follows it.
    assert policy.proceed(decision, Draft(1, table[:1], (), [0.0, 0.0], 0.3)) is True
    assert policy.proceed(decision, Draft(2, table[:2], (), [0.0, 0.0, 0.0], 0.0)) is False
    answer = policy.proceed(decision, Draft(2, table[:2], (), [0.0, 0.0, 0.0], 0.3))
    assert answer in (False, LOOKUP)  # what is left is hardly worth a wider verification
    policy.submit(decision, Draft(3, table[:3], (), [0.0, 0.0, 0.4]))
    step = decision.features
    assert step.forwards == 2
    assert step.survival[3] == pytest.approx(0.4 * step.survival[2])


def test_the_guard_takes_a_turn_for_where_the_policy_stopped() -> None:
    """A fixed gamma drafts with the model: what a lookup's tail did tells nothing of it."""

    class Inner(Policy):
        learns = True

        def decide(self, context: Context) -> Decision:
            return Decision(self.new_id(), 16, ask_per_token=True)

        def proceed(self, decision: Decision, draft: Draft) -> bool | str:
            drafted = draft.drafted
            return LOOKUP if drafted == 2 else True

    context = Context(level="nf4", drafters=("hybrid", "model", LOOKUP))
    switch, ask_per_token = (SafetyGuard(Inner(), sleeps=False) for _ in range(2))
    for guard, (k, n, labelled) in ((switch, (9, 2, 3)), (ask_per_token, (2, 2, 2))):
        guard.set_costs = None  # type: ignore[attr-defined]
        for step in range(12):
            context.step = step
            decision = guard.decide(context)
            if decision.id in guard._taken:
                for j in range(1, 4):
                    assert guard.proceed(decision, Draft(j, np.ones((16, 4))[:j])) is True
                guard.submit(decision, Draft(4, np.ones((16, 4))[:4]))
                guard.learn(decision, Outcome(4, 1, 2, 2, 0.2, 0.05, 0.1, "nf4", 10, 0, np.ones((4, 4))))
                continue
            for j in range(1, 10):
                if guard.proceed(decision, Draft(j, np.ones((16, 4))[:j])) == LOOKUP and guard is ask_per_token:
                    break
            guard.learn(decision, Outcome(k, n, labelled, n + 1, 0.2, 0.05, 0.1, "nf4", 10, 0, np.ones((k, 4)), "", 2))
    ours, theirs = switch.ledger("nf4"), ask_per_token.ledger("nf4")
    assert ours.tokens == theirs.tokens
    assert ours.fixed_steps == pytest.approx(theirs.fixed_steps)
    assert ours.seen == theirs.seen
    assert ours.forwards == theirs.forwards == 1.0
    assert ours.probes == theirs.probes
    assert not switch._switched


def test_a_probe_is_drafted_by_the_default_drafter() -> None:
    guard = SafetyGuard(Turner(always=True), sleeps=False)
    context = Context(level="nf4", drafters=("hybrid", "model", LOOKUP), lookup_alternative=0.4)
    for step in range(200):
        context.step = step
        decision = guard.decide(context)
        assert decision.drafter == ("" if decision.id in guard._taken else LOOKUP)
        if decision.id in guard._taken:
            assert guard._taken[decision.id] == 0  # where it would have left the model
    assert len(guard._switched) <= 1024


def test_hindsight_knows_of_turns(tiny_pair: TinyPair) -> None:
    drafter = drafters(tiny_pair)["always asked"]
    traces = traced(tiny_pair, drafter)
    without = [replace(t, meta={k: v for k, v in t.meta.items() if k != "lookup_weights"}) for t in traces]
    for bound in (clairvoyant, dynamic_programming_bound):
        assert bound(traces, DEAR)["fp32"].goodput > bound(without, DEAR)["fp32"].goodput
    switched = Simulator(Turner(seed=1, always=True), DEAR).run(traces)
    assert dynamic_programming_bound(traces, DEAR)["fp32"].seconds.sum() <= switched.seconds.sum()
    assert clairvoyant(traces, DEAR)["fp32"].tokens == sum(len(t) for t in traces)


def test_traces_without_weights_offer_nothing_and_bad_ones_are_refused(tiny_pair: TinyPair, tmp_path) -> None:
    drafter = drafters(tiny_pair)["as shipped"]
    (trace, *_) = traced(tiny_pair, drafter)
    assert trace.meta["lookup_weights"] == Gate.load().sure_weights
    again = Trace.load(trace.save(tmp_path / "a.npz"))
    assert again.meta == trace.meta
    assert again.switch is not None
    points = [(t, j) for t in range(len(trace)) for j in range(trace.gamma)]
    assert trace.switch is not None
    forth, back = (
        [again.switch.lookup_alternative(t, j) for t, j in points],
        [trace.switch.lookup_alternative(t, j) for t, j in reversed(points)],
    )
    assert forth == back[::-1]  # in whatever order they are asked for
    old = replace(trace, meta={"drafter": "hybrid"})
    assert old.switch is None
    policy = Turner()
    Simulator(policy, DEAR).replay(old)
    assert not any(lookup_alternative for _, _, lookup_alternative in policy.told)
    for weights in ([1.0, 2.0], [float("nan")] * 5, "abc", [True] * 5, None):
        bad = replace(trace, meta=trace.meta | {"lookup_weights": weights}).save(tmp_path / "bad.npz")
        with pytest.raises(UserError, match="lookup_weights"):
            Trace.load(bad)
    lookup = redraft(NgramDrafter(), trace, task="", prompt_id="p", split="")
    assert lookup.switch is None
    assert lookup.gamma == MAX_GAMMA
