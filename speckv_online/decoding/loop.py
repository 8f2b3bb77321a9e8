"""The decoding loop: draft, verify, keep what agrees, one more token from the target.

Speculative decoding (Leviathan et al., 2023; Chen et al., 2023) with a policy that sets the number of drafted tokens.
The output is what the target alone would have said, whatever the drafter and the policy do: the same tokens in greedy
decoding, the same distribution in sampled decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import perf_counter
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policies.base import MAX_GAMMA, N_SIGNALS, Outcome, Policy
from speckv_online.context import History
from speckv_online.cpu_engine.target_forward import read_on
from speckv_online.decoding.generation import Generation, Totals
from speckv_online.decoding.inputs import as_drafter, as_policy
from speckv_online.decoding.propose import draft, draft_ahead, is_exhausted, judge_ahead
from speckv_online.decoding.sequence import TokenSequence, record_of, untimed
from speckv_online.decoding.timing import StepClock
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.gpu_engine.graphed_llama import graphs_of
from speckv_online.gpu_engine.static_cache import StaticKVCache
from speckv_online.io.step_records import StepRecord
from speckv_online.modeling.introspection import check_model, eos_of, level_of, text_config
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.modeling.longrope import RopeSwitch
from speckv_online.modeling.sampling import Sampler


class DecodingLoop:
    """Decodes one sequence at a time; :class:`~speckv_online.decoding.decoder.SpeculativeDecoder` has the
    parameters."""

    def __init__(
        self,
        draft: Drafter | PreTrainedModel | None,
        *,
        policy: Policy | str,
        target: PreTrainedModel | None = None,
        level: str | None = None,
        max_gamma: int = MAX_GAMMA,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.policy = as_policy(policy)
        if not 0 <= max_gamma <= MAX_GAMMA:
            raise UserError(f"max_gamma must be from 0 to {MAX_GAMMA}, got {max_gamma}")
        self.max_gamma, self.tokenizer = max_gamma, tokenizer
        self.last: Generation | list[Generation] = Generation()
        self.totals = Totals()
        self._given = draft, level
        self._signals = np.zeros((max(max_gamma, 1), N_SIGNALS))
        self._target: PreTrainedModel | None = None
        if target is not None:
            self.bind(target)

    @property
    def target(self) -> PreTrainedModel:
        """The model that is decoded with; raises :class:`UserError` while there is none."""
        if self._target is None:
            raise UserError("the decoder has no target yet: give it target=, or use it as custom_generate=")
        return self._target

    def bind(self, target: PreTrainedModel) -> None:
        """Decode with this target from now on.

        Raises
        ------
        UserError
            If the decoder cannot drive the model, or the draft does not fit it.
        """
        if target is self._target:
            return
        check_model(target, "target")
        draft, level = self._given
        self.drafter = as_drafter(draft, target)
        self.level = level_of(target) if level is None else level
        self.layers = int(text_config(target).num_hidden_layers)
        self.max_length = int(getattr(text_config(target), "max_position_embeddings", 1 << 30))
        self.embedded = len(target.get_input_embeddings().weight)  # type: ignore[arg-type]
        self.rope = RopeSwitch.of(target)
        self.eos_ids = eos_of(target)
        self._clock = StepClock(target.device)
        self.graphs = graphs_of(target)
        self._target = target

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        task: str = "",
        eos_ids: Collection[int] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        sampler: Sampler | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
        cache: KVCache | None = None,
    ) -> Generation:
        """Continue ``prompt_ids`` by at most ``max_new_tokens`` tokens.

        Parameters
        ----------
        prompt_ids : sequence of int
            At least one token.
        max_new_tokens : int
            Budget; it shrinks where the target's context ends. Where the draft's ends, nothing more is drafted.
        task : str
            Task label for the policy.
        eos_ids : collection of int, optional
            Tokens that end the sequence; by default those of the target's generation config.
        on_tokens : callable, optional
            Called after each step with its new tokens.
        on_logits : callable, optional
            Called in each step, before its drafts are judged, with the target's logits, shape (drafted + 1, vocab).
        sampler : Sampler, optional
            How tokens are drawn; greedy decoding without one.
        should_stop : callable, optional
            Called for each new token with the whole sequence up to it; True ends the sequence there.
        cache : KVCache, optional
            An empty cache for the target, for callers who want it afterwards; it holds all tokens but the last.

        Raises
        ------
        UserError
            If the prompt is empty or longer than the target's context.
        """
        started = perf_counter()
        prompt = self.check_prompt(prompt_ids)
        budget = min(max_new_tokens, self.room(prompt))
        capacity = len(prompt) + budget + self.max_gamma + 1
        if cache is None and self.graphs is not None:
            cache = self.graphs.cache(capacity)
        cache = KVCache(self.layers, capacity) if cache is None else cache
        if self.drafter is not None:
            self.drafter.begin(list(prompt), capacity, sampler)
        eos = self.eos_ids if eos_ids is None else frozenset(eos_ids)
        sequence = TokenSequence(list(prompt), eos, sampler, should_stop)
        history, out = History(self.level, task, len(prompt)), Generation()
        history.context.drafters = self.drafter.names if self.drafter is not None else ()
        history.context.tokens = sequence.tokens
        self.policy.begin(history.context)
        self._learning = 0.0  # seconds that the policy took to learn from the step before
        out.prefill_seconds = perf_counter() - started

        while len(out.tokens) < budget:
            remaining = history.context.remaining = budget - len(out.tokens)
            history.context.max_gamma = self.limit(remaining, history.context.context_length)
            tokens, outcome = self._step(sequence, cache, history, out.steps, on_logits)
            out.tokens += tokens
            history.update(outcome)
            if on_tokens is not None:
                on_tokens(tokens)
            if sequence.finish:
                out.finish = sequence.finish
                break
        if len(prompt) > 1:
            out.charge_prompt()
        out.seconds = perf_counter() - started
        self.last = out
        self.totals.add(out)
        return out

    def check_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt as a list; raises :class:`UserError` if it is empty, too long, or of unknown tokens."""
        self.target  # noqa: B018 - refuses to go on without one
        prompt = [int(t) for t in prompt_ids]
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        if len(prompt) > self.max_length:
            raise UserError(f"the prompt has {len(prompt)} tokens, the target holds only {self.max_length}: shorten it")
        if not 0 <= min(prompt) <= max(prompt) < self.embedded:
            raise UserError(
                f"the prompt has token ids from {min(prompt)} to {max(prompt)}, the target knows 0 to "
                f"{self.embedded - 1}: use its own tokenizer"
            )
        return prompt

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow a prompt: one that fills the context still has a next token, never read."""
        return max(self.max_length - len(prompt), 1)

    def limit(self, remaining: int, context_length: int) -> int:
        """Most tokens worth drafting: one fewer than the budget (the target adds one), never past the contexts."""
        if self.drafter is None:
            return 0
        room = min(self.max_length, self.drafter.max_length, self.rope.end(context_length)) - context_length
        return max(0, min(self.max_gamma, remaining - 1, room))

    def _captures(self) -> int:
        """Graphs that were recorded so far."""
        return sum(g.captures for g in (self.graphs, getattr(self.drafter, "graphs", None)) if g is not None)

    def _forward(self, tokens: list[int], cache: KVCache, keep: int, ahead: torch.Tensor | None) -> torch.Tensor:
        """Run the target over ``tokens`` and the drafts of ``ahead``; return the last ``keep`` rows of logits."""
        target = self.target
        if self.graphs is not None and isinstance(cache, StaticKVCache):
            return self.graphs.read(tokens, cache, keep, ahead)
        if ahead is None and (logits := read_on(target, tokens, cache, keep)) is not None:
            return logits
        ids = torch.tensor([tokens], device=target.device)
        if ahead is not None:
            ids = torch.cat((ids, ahead[None, :, 0].to(target.device, torch.long)), dim=1)
        return target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _step(
        self,
        sequence: TokenSequence,
        cache: KVCache,
        history: History,
        records: list[StepRecord],
        on_logits: Callable[[torch.Tensor], None] | None,
    ) -> tuple[list[int], Outcome]:
        """Draft, verify and learn once; return the new tokens and the outcome."""
        policy, drafter, signals, clock = self.policy, self.drafter, self._signals, self._clock
        context, captures = history.context, self._captures()
        t0 = perf_counter()
        lookups = context.lookups = [] if drafter is None else [drafter.sure()]
        context.offer = 0.0 if drafter is None else drafter.offer()
        decision = policy.decide(context)
        gamma = min(decision.gamma, context.max_gamma)
        t1 = perf_counter()
        clock.draft()
        drafts: list[int] = []
        context.drafts = drafts
        lag, used, asked = 0, "", 0.0  # asked: seconds spent in the policy after its decision
        sampled, ahead = sequence.sampler is not None, None
        if drafter is not None:
            lag, used = drafter.lag, drafter.use(decision.drafter)
            if decision.drafter:  # not the one that was asked
                lookups = context.lookups = [drafter.sure()]
                context.offer = drafter.offer()
            ahead = draft_ahead(drafter, decision, gamma, sampled)
            if ahead is None:
                # Dropping a drawn token for what it is would bias the output: no trimming in sampled decoding.
                asked = draft(policy, drafter, decision, context, gamma, signals, drafts, lookups, not sampled)
        clock.verify()
        self.rope.restart(cache, context.context_length)
        unread = sequence.tokens[len(cache) :]  # the latest token; in the first step the whole prompt
        logits = self._forward([*unread, *drafts], cache, 1 + (gamma if ahead is not None else len(drafts)), ahead)
        if on_logits is not None:
            on_logits(logits)
        if ahead is not None:
            n, following = judge_ahead(logits, ahead, cast(ModelDrafter, drafter), signals, drafts, clock)
        else:
            clock.launched()
            n, following = sequence.verify(logits, drafts, drafter.proposals[: len(drafts)] if drafter else ())
        clock.done()

        k = len(drafts)
        tokens = sequence.append([*drafts[:n], following])
        tested = min(n + 1, k)
        if len(tokens) <= n:  # the end came inside the draft: nothing is known of what follows it
            n = tested = len(tokens)
        cache.truncate(context.context_length + len(tokens) - 1)
        unused = getattr(drafter, "unused", 0)  # of a drafter that drafts by the chunk
        if drafter is not None:
            drafter.end(n)
            drafter.extend(tokens)
        forwards = k if ahead is not None else lookups[:-1].count(0.0) + unused
        draft_seconds, verify_seconds = clock.seconds()
        outcome = Outcome(
            drafted=k, accepted=n, tested=tested, produced=len(tokens), draft_seconds=draft_seconds - asked,
            verify_seconds=verify_seconds, level=self.level, context_length=context.context_length,
            caught_up=max(lag - 1, 0) if forwards else 0, signals=signals[:k].copy(), drafter=used, forwards=forwards,
            exhausted=is_exhausted(used, k, lookups),
        )  # fmt: skip
        t2 = perf_counter()
        outcome.seconds = t2 - t0 + self._learning
        outcome.policy_seconds = t1 - t0 + asked + self._learning
        # A forward that read the prompt too says nothing of what a step takes, nor does one that recorded a graph.
        usual = len(unread) == 1 and self._captures() == captures
        learnt = outcome if usual else untimed(outcome, draft=self._captures() == captures)
        policy.learn(decision, learnt)
        t3 = perf_counter()
        self._learning = t3 - t2
        records.append(record_of(context, decision, outcome, t1 - t0 + asked + t3 - t2, t3 - t0))
        return tokens, outcome
