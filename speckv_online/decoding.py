"""The decoding loop: draft, verify, keep what agrees, one more token from the target.

Speculative decoding (Leviathan et al., 2023; Chen et al., 2023) with a policy that sets the number of drafted tokens.
The output is what the target alone would have said, whatever the drafter and the policy do: the same tokens in greedy
decoding, the same distribution in sampled decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import MAX_GAMMA, N_SIGNALS, Outcome, Policy
from policies.guard import FaultGuard
from speckv_online.drafters import NO_PROPOSAL, Drafter
from speckv_online.errors import UserError
from speckv_online.kvcache import KVCache
from speckv_online.records import StepRecord
from speckv_online.sampling import Sampler
from speckv_online.signals import History, summarise


@dataclass(slots=True)
class Generation:
    """What one call of :meth:`SpeculativeDecoder.generate` gave.

    Attributes
    ----------
    tokens : list of int
        New tokens, an end-of-sequence token included.
    steps : list of StepRecord
        One record per step; their ``produced`` add up to ``len(tokens)``.
    prefill_seconds, seconds : float
        Time to read the prompt, and time of the whole call.
    finish : str
        ``"eos"``, ``"stop"`` (asked by ``should_stop``) or ``"length"``.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    finish: str = "length"

    @property
    def decode_seconds(self) -> float:
        """Seconds of all steps together, prefill left out."""
        return sum(s.seconds for s in self.steps)

    @property
    def goodput(self) -> float:
        """Tokens per second of decoding, prefill left out."""
        return len(self.tokens) / max(self.decode_seconds, 1e-12)


@dataclass(slots=True)
class _Sequence:
    """A sequence being decoded: all its tokens, the target's cache, and how it goes on and ends."""

    tokens: list[int]
    cache: KVCache
    eos: Collection[int]
    sampler: Sampler | None
    should_stop: Callable[[list[int]], bool] | None
    finish: str = ""

    def verify(
        self, logits: torch.Tensor, drafts: list[int], proposals: Sequence[torch.Tensor | None]
    ) -> tuple[int, int]:
        """Return how many drafts the target accepts, and the token that follows them."""
        if self.sampler is not None:
            return self.sampler.verify(self.sampler.probabilities(logits, self.tokens, drafts), drafts, proposals)
        choices = logits.argmax(-1).tolist()
        n = 0
        while n < len(drafts) and drafts[n] == choices[n]:
            n += 1
        return n, choices[n]

    def append(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first that ends the sequence, and return those."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if token in self.eos:
                self.finish = "eos"
            elif self.should_stop is not None and self.should_stop(self.tokens):
                self.finish = "stop"
            if self.finish:
                return tokens[: i + 1]
        return tokens


class SpeculativeDecoder:
    """Decodes one sequence at a time with a target, a drafter and a policy.

    Parameters
    ----------
    drafter : Drafter or None
        Proposes tokens; None allows only gamma 0.
    policy : Policy
        Sets gamma in every step. It is wrapped in a fault guard: an exception or an impossible answer costs speed only.
    target : PreTrainedModel
        Decoder-only model in eval mode.
    level : str
        Name of the target's compression level, shown to the policy.
    max_gamma : int
        Most tokens that any step drafts.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        *,
        policy: Policy,
        target: PreTrainedModel,
        level: str = "fp16",
        max_gamma: int = MAX_GAMMA,
    ) -> None:
        self.target, self.drafter, self.level, self.max_gamma = target, drafter, level, max_gamma
        self.policy = policy if isinstance(policy, FaultGuard) else FaultGuard(policy)
        self.max_length = int(getattr(target.config, "max_position_embeddings", 1 << 30))
        if drafter is not None:
            self.max_length = min(self.max_length, drafter.max_length)
        eos = target.generation_config.eos_token_id if target.generation_config is not None else None
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
        self._signals = np.zeros((max(max_gamma, 1), N_SIGNALS))

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        task: str = "",
        eos_ids: Collection[int] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        sampler: Sampler | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
    ) -> Generation:
        """Continue ``prompt_ids`` by at most ``max_new_tokens`` tokens.

        Parameters
        ----------
        prompt_ids : sequence of int
            At least one token.
        max_new_tokens : int
            Budget; it shrinks where the models' context ends.
        task : str
            Task label for the policy.
        eos_ids : collection of int, optional
            Tokens that end the sequence; by default those of the target's generation config.
        on_tokens : callable, optional
            Called after each step with its new tokens.
        sampler : Sampler, optional
            How tokens are drawn; greedy decoding without one.
        should_stop : callable, optional
            Called for each new token with the whole sequence up to it; True ends the sequence there.

        Raises
        ------
        UserError
            If the prompt is empty or leaves no room in the models' context.
        """
        started = perf_counter()
        prompt = [int(t) for t in prompt_ids]
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_length:
            raise UserError(f"the prompt has {len(prompt)} tokens, the models hold only {self.max_length}: shorten it")
        budget = min(max_new_tokens, self.max_length - len(prompt))
        eos = self.eos_ids if eos_ids is None else frozenset(eos_ids)
        capacity = len(prompt) + budget + self.max_gamma + 1
        cache = KVCache(int(self.target.config.num_hidden_layers), capacity)
        if self.drafter is not None:
            self.drafter.begin(prompt, capacity, sampler)
        if len(prompt) > 1:
            self._forward(prompt[:-1], cache, keep=1)
        sequence = _Sequence(prompt, cache, eos, sampler, should_stop)
        history, out = History(self.level, task, len(prompt)), Generation()
        self.policy.begin(history.context)
        out.prefill_seconds = perf_counter() - started

        while len(out.tokens) < budget:
            history.context.max_gamma = self._limit(budget - len(out.tokens), history.context.context_length)
            tokens, outcome = self._step(sequence, history, out.steps)
            out.tokens += tokens
            history.update(outcome)
            if on_tokens is not None:
                on_tokens(tokens)
            if sequence.finish:
                out.finish = sequence.finish
                break
        out.seconds = perf_counter() - started
        return out

    def _limit(self, remaining: int, context_length: int) -> int:
        """Most tokens worth drafting: one fewer than the budget (the target adds one) and never past the context."""
        if self.drafter is None:
            return 0
        return max(0, min(self.max_gamma, remaining - 1, self.max_length - context_length))

    def _forward(self, tokens: list[int], cache: KVCache, keep: int = 0) -> torch.Tensor:
        """Run the target over ``tokens``; return the logits of the last ``keep`` of them (0: all), shape (n, vocab)."""
        ids = torch.tensor([tokens], device=self.target.device)
        return self.target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _step(self, sequence: _Sequence, history: History, records: list[StepRecord]) -> tuple[list[int], Outcome]:
        """Draft, verify and learn once; return the new tokens and the outcome."""
        policy, drafter, signals, context = self.policy, self.drafter, self._signals, history.context
        t0 = perf_counter()
        decision = policy.decide(context)
        gamma = min(decision.gamma, context.max_gamma)
        t1 = perf_counter()
        asked = 0.0  # time spent in the policy after its decision
        drafts: list[int] = []
        lag = drafter.lag if drafter is not None else 0
        if drafter is not None:
            while len(drafts) < gamma:
                token = drafter.draft(signals[len(drafts)])
                if token == NO_PROPOSAL:
                    break
                drafts.append(token)
                if decision.stops and len(drafts) < gamma:
                    t = perf_counter()
                    go_on = policy.proceed(decision, len(drafts), signals)
                    asked += perf_counter() - t
                    if not go_on:
                        break
            # Dropping a drawn token for what it is would bias the output: drafts are trimmed in greedy decoding only.
            if decision.stops and drafts and sequence.sampler is None:
                t = perf_counter()
                del drafts[policy.submit(decision, len(drafts), signals) :]
                asked += perf_counter() - t
        k = len(drafts)
        t2 = perf_counter()
        logits = self._forward([sequence.tokens[-1], *drafts], sequence.cache)
        n, following = sequence.verify(logits, drafts, drafter.proposals[:k] if drafter is not None else ())
        t3 = perf_counter()

        tokens = sequence.append([*drafts[:n], following])
        tested = min(n + 1, k)
        if len(tokens) <= n:  # the end came inside the draft: nothing is known of what follows it
            n = tested = len(tokens)
        sequence.cache.truncate(context.context_length + n)
        if drafter is not None:
            drafter.end(n)
            drafter.extend(tokens)
        outcome = Outcome(
            drafted=k, accepted=n, tested=tested, produced=len(tokens), draft_seconds=t2 - t1 - asked,
            verify_seconds=t3 - t2, level=self.level, context_length=context.context_length,
            caught_up=max(lag - 1, 0) if k else 0, signals=signals[:k].copy(),
        )  # fmt: skip
        t4 = perf_counter()
        outcome.seconds = t4 - t0
        policy.learn(decision, outcome)
        t5 = perf_counter()
        mean_h, max_h, mean_c, min_c = summarise(outcome.signals)
        records.append(
            StepRecord(
                step=context.step, gamma=decision.gamma, drafted=k, accepted=n, tested=tested, produced=len(tokens),
                mean_draft_entropy=mean_h, mean_draft_confidence=mean_c, max_draft_entropy=max_h,
                min_draft_confidence=min_c, context_length=context.context_length, propensity=decision.propensity,
                policy_version=decision.policy_version, decision_id=decision.id,
                decide_seconds=t1 - t0 + asked + t5 - t4, draft_seconds=outcome.draft_seconds,
                verify_seconds=outcome.verify_seconds, seconds=t5 - t0,
            )
        )  # fmt: skip
        return tokens, outcome
