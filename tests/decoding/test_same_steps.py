"""A batch of one, a single decode, transformers' assisted generation and a replay take the same steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from policies.base import Context, Decision, Draft, Outcome, Policy
from policies.costs.prior import CostPrior
from policies.guards.fault import Wrapper
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.hf_assistant import PolicyAssistant
from speckv_online.drafters.model import ModelDrafter
from speckv_online.profiling.trace_collection import collect_trace
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.simulator import Simulator
from tests.support.decoding import plain, prompt_of
from tests.support.tiny_models import TinyPair, perturbed

BUDGET = 40
COSTS = CostTable("even", {"fp32": LevelCost(0.01, (0.1, 0.11), 0.001)})
#: The last three stop token by token; the last one is told that the draft takes long to read the prompt.
POLICIES = ("fixed:4", "online", "svip", "online:lookups=off,acceptance=none", "online:lookups=off")


class Notes(Wrapper):
    """Keeps what a policy is shown and what it answers, and tells it of no seconds: they differ from run to run."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.told: list[tuple[Any, ...]] = []

    def decide(self, context: Context) -> Decision:
        decision = self.policy.decide(context)
        c = context
        self.told.append((c.step, c.position, c.context_length, c.max_gamma, c.remaining, c.last_drafted, c.unread,
                          c.last_accepted, c.idle, round(c.acceptance, 6), list(c.tokens), decision.gamma))  # fmt: skip
        self.told.append(tuple(np.round([c.mean_entropy, c.mean_confidence, c.max_entropy, c.min_confidence], 2)))
        return decision

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        answer = self.policy.proceed(decision, draft)
        self.told.append((draft.drafted, list(draft.tokens), list(draft.lookups), answer))
        return answer

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        o = outcome
        self.told.append((o.drafted, o.accepted, o.labelled, o.produced, o.context_length, list(o.tokens), o.forwards))
        o.seconds = o.draft_seconds = o.verify_seconds = o.policy_seconds = 0.0
        self.policy.learn(decision, o)


def made(spec: str) -> Notes:
    policy = make_policy(spec, seed=0)
    if hasattr(policy, "set_costs"):
        dear = 0.1 if spec == POLICIES[-1] else 0.0
        policy.set_costs("fp32", CostPrior(0.01, (0.1, 0.11), 0.001, catch_up_seconds=dear))
    return Notes(policy)


@pytest.mark.parametrize("ends", [False, True], ids=["budget", "eos inside a draft"])
@pytest.mark.parametrize("spec", POLICIES)
def test_four_ways_take_the_same_steps(tiny_pair: TinyPair, spec: str, ends: bool) -> None:
    target = tiny_pair.target
    draft = perturbed(target, 0.02) if ends else tiny_pair.draft
    prompt = prompt_of(12, 3)
    reference = plain(target, prompt, BUDGET)
    eos = {reference[13]} if ends else set()
    drafter = ModelDrafter(draft, 260)
    trace, _ = collect_trace(target, drafter, prompt, BUDGET, level="fp32", eos_ids=eos)
    assert len(trace.tokens) < BUDGET if ends else len(trace.tokens) == BUDGET

    single, batch, assistant, replay = (made(spec) for _ in range(4))
    SpeculativeDecoder(drafter, policy=single, target=target, level="fp32").generate(prompt, BUDGET, eos_ids=eos)
    SpeculativeDecoder(drafter, policy=batch, target=target, level="fp32").decode_batch([prompt], BUDGET, eos_ids=eos)
    Simulator(replay, COSTS).replay(trace)
    assisted, ids = PolicyAssistant(assistant, level="fp32"), torch.tensor([prompt])
    options = {"eos_token_id": [*eos], "pad_token_id": 0} if ends else {"eos_token_id": None}
    with assisted.attached_to(target):
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=draft, do_sample=False, max_new_tokens=BUDGET,
            **options,
        )  # fmt: skip
    assert out[0, len(prompt) :].tolist() == trace.tokens.tolist()
    assert single.told == batch.told == replay.told == assistant.told
    outcomes = [told for told in single.told if len(told) == 7]
    assert len(outcomes) > 2
    drafts = [told[5] for told in outcomes]
    assert any(drafts) == (spec != POLICIES[-1])
    assert all(token not in eos for draft in drafts for token in draft[:-1])  # nothing is drafted after an end
    assert any(draft and draft[-1] in eos for draft in drafts) or not (ends and spec == "fixed:4")


def test_what_a_policy_does_to_its_arguments_changes_no_token(tiny_pair: TinyPair) -> None:
    class Vandal(Policy):
        def decide(self, context: Context) -> Decision:
            limit = context.max_gamma
            for name in ("position", "context_length", "step", "remaining", "max_gamma"):
                setattr(context, name, 999)
            context.acceptance = float("nan")
            context.drafters = ("nobody",)
            with pytest.raises(TypeError):
                context.tokens[0] = 1  # type: ignore[index]
            with pytest.raises(AttributeError):
                context.tokens.append(1)  # type: ignore[attr-defined]
            context.tokens[:].clear()  # type: ignore[attr-defined]
            self.last = Decision(self.new_id(), min(6, limit), ask_per_token=True)
            return self.last

        def proceed(self, decision: Decision, draft: Draft) -> bool:
            with pytest.raises(ValueError, match="read-only"):
                draft.signals[0] = 0.0
            draft.tokens.clear()  # type: ignore[attr-defined]
            draft.lookups.clear()  # type: ignore[attr-defined]
            self.last.gamma = decision.gamma = 10**6
            return True

        def learn(self, decision: Decision, outcome: Outcome) -> None:
            outcome.signals[:] = float("nan")
            outcome.produced = outcome.accepted = outcome.drafted = 77
            outcome.tokens.clear()  # type: ignore[attr-defined]

    drafter, prompts = ModelDrafter(perturbed(tiny_pair.target, 0.02), 260), [prompt_of(9, 4), prompt_of(12, 1)]
    wanted = [plain(tiny_pair.target, p, 30) for p in prompts]
    decoder = SpeculativeDecoder(drafter, policy=Vandal(), target=tiny_pair.target)
    single = [decoder.generate(p, 30, eos_ids=()) for p in prompts]
    batch = decoder.decode_batch(prompts, 30, eos_ids=())
    assert [out.tokens for out in single] == [out.tokens for out in batch] == wanted
    assert not decoder.policy.faults
    for out in (*single, *batch):
        assert sum(s.produced for s in out.steps) == 30
        assert all(s.accepted <= s.drafted <= 6 for s in out.steps)
    assert any(s.accepted > 1 for s in single[0].steps)
