"""Replays beside real decoding."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from policies.base import ARMS, CONFIDENCE, MAX_GAMMA, N_SIGNALS, Context, Decision, Draft, Outcome, Policy
from policies.fixed import Autoregressive, Fixed
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.io.step_records import StepRecord
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace, agreement
from speckv_online.training.schedules import Schedule

LEVEL = LevelCost(0.01, (0.05, 0.06), 0.002, 1e-4, 50, catch_up_seconds=1e-3, first_draft_seconds=0.004)


COST = CostTable("test", {"fp32": LEVEL})


class Picky(Policy):
    """Stops at a token of low confidence and withholds it: a token-level rule whose threshold moves with acceptance."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = 0.3

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 3 if context.step % 3 == 1 else MAX_GAMMA, ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        drafted, signals = draft.drafted, draft.signals
        return bool(signals[drafted - 1, CONFIDENCE] > self.threshold)

    def submit(self, decision: Decision, draft: Draft) -> int:
        drafted, signals = draft.drafted, draft.signals
        return drafted - int(signals[drafted - 1, CONFIDENCE] <= self.threshold / 2)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.threshold += 0.01 if outcome.rejected else -0.02


POLICIES = {
    "autoregressive": Autoregressive,
    "fixed:1": lambda: Fixed(gamma=1),
    "fixed:4": lambda: Fixed(gamma=4),
    "fixed:16": lambda: Fixed(gamma=16),
    "random": lambda: Schedule(ARMS, seed=7),
    "stopping": Picky,
}


def summary(steps: list[StepRecord]) -> list[tuple[int, ...]]:
    return [(s.gamma, s.drafted, s.accepted, s.labelled, s.produced) for s in steps]


def compare(
    target: PreTrainedModel, drafter: ModelDrafter, traces: list[Trace], name: str, eos_ids: tuple[int, ...] | None
) -> None:
    """Decode and replay the same prompts under two equal policies, which carry what they learnt to the next prompt."""
    make = POLICIES.get(name, lambda: make_policy(name))
    decoder = SpeculativeDecoder(drafter, policy=make(), target=target, level="fp32")
    simulator = Simulator(make(), COST)
    for trace in traces:
        real = decoder.generate(trace.prompt.tolist(), trace.budget, task="chat", eos_ids=eos_ids)
        replay = simulator.replay(trace)
        modelled = list(
            zip(replay.gamma, replay.drafted, replay.accepted, replay.labelled, replay.produced, strict=True)
        )
        assert summary(real.steps) == modelled
        assert real.tokens == trace.tokens.tolist()
        assert not decoder.policy.faults
        assert not simulator.policy.faults


def made(accepted: list[int], finish: str = "length", prompt: int = 10, level: str = "fp32") -> Trace:
    """A trace with given accepted lengths; the signals count the positions."""
    length, gamma = len(accepted), MAX_GAMMA
    tokens = np.arange(1, length + 1, dtype=np.int32)
    follow = np.append(tokens, np.full(gamma, -7, dtype=np.int32))
    drafts = np.full((length, gamma), -9, dtype=np.int32)
    for t, a in enumerate(accepted):
        drafts[t, :a] = follow[t : t + a]
    signals = np.full((length, gamma, N_SIGNALS), 0.5, dtype=np.float32)
    budget = length + (3 if finish == "eos" else 0)
    trace = Trace(
        level, "chat", "p", np.arange(prompt, dtype=np.int32), tokens, drafts, agreement(drafts, tokens), signals,
        budget, finish,
    )  # fmt: skip
    trace.check()
    return trace
