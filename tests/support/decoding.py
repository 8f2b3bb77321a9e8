"""Decoding by hand: a scripted policy, and what the target says alone."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import ENTROPY, Context, Decision, Draft, Outcome, Policy

_PLAIN: dict[tuple[PreTrainedModel, tuple[int, ...], int], list[int]] = {}


class Scripted(Policy):
    """Asks for the gammas of a list, over and over, and records what it is told."""

    def __init__(self, gammas: list[int], stops: bool = False, **options: int) -> None:
        super().__init__(**options)
        self.gammas, self.stops = gammas, stops
        self.contexts: list[tuple[int, ...]] = []
        self.outcomes: list[Outcome] = []

    def decide(self, context: Context) -> Decision:
        c = context
        self.contexts.append((c.step, c.position, c.context_length, c.max_gamma, c.remaining))
        return Decision(self.new_id(), self.gammas[context.step % len(self.gammas)], stops=self.stops)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        drafted, signals = draft.drafted, draft.signals
        return bool(signals[drafted - 1, ENTROPY] < 3.5)

    def submit(self, decision: Decision, draft: Draft) -> int:
        drafted = draft.drafted
        return max(drafted - 1, 1)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def plain(target: PreTrainedModel, prompt: list[int], n: int) -> list[int]:
    """Transformers' own greedy decoding; an answer that was asked for before is remembered."""
    key = (target, tuple(prompt), n)
    if key not in _PLAIN:
        ids = torch.tensor([prompt])
        out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n)
        _PLAIN[key] = out[0, len(prompt) :].tolist()
    return _PLAIN[key]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 257, length).tolist()
