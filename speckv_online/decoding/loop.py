"""The decoding loop: draft, verify, keep what agrees, one more token from the target.

Speculative decoding (Leviathan et al., 2023; Chen et al., 2023) with a policy that sets the number of drafted tokens.
The output is what the target alone would have said, whatever the drafter and the policy do: the same tokens in greedy
decoding, the same distribution in sampled decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import perf_counter
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policies.base import MAX_GAMMA, Outcome, Policy
from speckv_online.decoding.generation import Generation, Totals
from speckv_online.decoding.inputs import as_drafter, as_policy, check_uncompiled, token_ids, whole_number
from speckv_online.decoding.propose import draft, draft_async, judge_async
from speckv_online.decoding.row import Row
from speckv_online.decoding.sequence import TokenSequence
from speckv_online.decoding.timing import StepClock
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.gpu_engine.graphed_llama import graphs_of
from speckv_online.gpu_engine.static_cache import StaticKVCache
from speckv_online.learned.memory import make_memory
from speckv_online.modeling.engine import EngineStatus
from speckv_online.modeling.family_check import check_family
from speckv_online.modeling.fingerprint import remember_fingerprint
from speckv_online.modeling.forward_backend import backend_of
from speckv_online.modeling.introspection import (
    check_model,
    embedded_of,
    eos_of,
    level_of,
    longest_of,
    sizes_of,
    text_config,
)
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.modeling.longrope import RopeSwitch
from speckv_online.modeling.sampling import Sampler
from speckv_online.speculation import is_exhausted


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
        remember: bool | str = False,
    ) -> None:
        self.policy = as_policy(policy)
        self.memory = make_memory(policy, self.policy, remember)
        if not 0 <= max_gamma <= MAX_GAMMA:
            raise UserError(f"max_gamma must be from 0 to {MAX_GAMMA}, got {max_gamma}")
        self.max_gamma, self.tokenizer = max_gamma, tokenizer
        self.last: Generation | list[Generation] = Generation()
        self.totals = Totals()
        self._given, self._sizes = (draft, level), tuple[object, ...]()
        self._target: PreTrainedModel | None = None
        if target is not None:
            self.bind(target)

    @property
    def target(self) -> PreTrainedModel:
        """The model that is decoded with; raises :class:`UserError` while there is none."""
        if self._target is None:
            raise UserError("the decoder has no target yet: give it target=, or use it as custom_generate=")
        return self._target

    @property
    def engine(self) -> EngineStatus:
        """Whether the CPU engine runs the target, and why not."""
        return backend_of(self.target).status

    def bind(self, target: PreTrainedModel) -> None:
        """Decode with this target from now on.

        Raises
        ------
        UserError
            If the decoder cannot drive the model, or the draft does not fit it.
        """
        if target is not self._target:
            check_uncompiled(target, "target")
            check_model(target, "target")
            self._sizes = ()
            self._read(target)
            self._target = target
            if self.memory is not None:  # a 4-bit model's fingerprint is taken before its first forward
                remember_fingerprint(target)

    def begin(self, longest: int, batch: bool = False) -> None:
        """Look at the models before texts of up to so many tokens are decoded: somebody may have changed them.

        Raises
        ------
        UserError
            If a model is of a family that the decoder cannot drive, or the draft no longer fits.
        """
        target = self.target
        self._read(target)
        backend_of(target).begin()
        end = min(longest, self.max_length)
        check_family(target, "target", end, batch)
        if isinstance(self.drafter, ModelDrafter):
            check_family(self.drafter.model, "draft", end, batch)

    def _read(self, target: PreTrainedModel) -> None:
        """Read what the decoder needs to know of the models."""
        draft, level = self._given
        sizes = sizes_of(target, draft if isinstance(draft, PreTrainedModel) else None)
        if sizes != self._sizes:
            check_model(target, "target")
            self.drafter = as_drafter(draft, target)
            self._sizes = sizes
        if isinstance(self.drafter, ModelDrafter):
            self.drafter.refresh()
        self.level = level_of(target) if level is None else level
        self.layers = int(text_config(target).num_hidden_layers)
        self.max_length, self.embedded = longest_of(target), embedded_of(target)
        if isinstance(self.drafter, ModelDrafter) and self.drafter.vocab_size > self.embedded:
            raise UserError(
                f"the draft proposes tokens up to {self.drafter.vocab_size - 1}, the target knows 0 to "
                f"{self.embedded - 1}: make the drafter anew"
            )
        self.graphs = graphs_of(target)
        self.rope, self.eos_ids = RopeSwitch.of(target), eos_of(target)
        self._clock = StepClock(target.device)

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
            A cache for the target, for callers who want it afterwards: it then holds all tokens but the last. It may
            hold a part of the prompt already, from its beginning, and tokens before it (:attr:`KVCache.unseen`).

        Raises
        ------
        UserError
            If the prompt is empty or longer than the target's context.
        """
        started = perf_counter()
        unseen = 0 if cache is None else cache.unseen
        self.begin(unseen + len(token_ids(prompt_ids)) + whole_number(max_new_tokens))
        prompt = self.check_prompt(prompt_ids, cache)
        budget = min(whole_number(max_new_tokens), self.room(unseen + len(prompt)))
        capacity = unseen + len(prompt) + budget + self.max_gamma + 1
        if cache is None and self.graphs is not None:
            cache = self.graphs.cache(capacity)
        cache = KVCache(self.layers, capacity) if cache is None else cache
        if self.drafter is not None:
            self.drafter.begin(cache.before + prompt, capacity, sampler)
        eos = self.eos_ids if eos_ids is None else frozenset(eos_ids)
        if self.memory is not None:
            self.memory.begin(self.target, self.drafter, self.level)
        row = Row(
            self.policy, TokenSequence(list(prompt), eos, sampler, should_stop), level=self.level, task=task,
            drafters=self.drafter.names if self.drafter is not None else (), budget=budget, max_gamma=self.max_gamma,
            sampled=sampler is not None, unseen=unseen,
        )  # fmt: skip
        row.begin()
        out = row.out
        out.prefill_seconds = perf_counter() - started

        while row.remaining > 0:
            tokens = self._step(row, cache, on_logits)
            if on_tokens is not None:
                on_tokens(tokens)
            if row.sequence.finish:
                out.finish = row.sequence.finish
                break
        if len(prompt) > 1:
            out.charge_prompt()
        out.seconds = perf_counter() - started
        self.last = out
        self.totals.add(out)
        if self.memory is not None:
            self.memory.end([out])
        return out

    def check_prompt(self, prompt_ids: Sequence[int], cache: KVCache | None = None) -> list[int]:
        """Return the prompt as a list; raises :class:`UserError` if it is empty, too long, or of unknown tokens."""
        prompt = token_ids(prompt_ids)
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        length = len(prompt) if cache is None else cache.unseen + len(prompt)
        if length > self.max_length:
            raise UserError(f"the prompt has {length} tokens, the target holds only {self.max_length}: shorten it")
        if cache is not None and len(cache) >= length:
            raise UserError(f"the cache holds {len(cache)} tokens, the prompt only {length}: give it a longer prompt")
        if not 0 <= min(prompt) <= max(prompt) < self.embedded:
            raise UserError(
                f"the prompt has token ids from {min(prompt)} to {max(prompt)}, the target knows 0 to "
                f"{self.embedded - 1}: use its own tokenizer"
            )
        return prompt

    def room(self, length: int) -> int:
        """Most tokens that may follow so many: a prompt that fills the context still has a next token, never read."""
        return max(self.max_length - length, 1)

    def limit(self, remaining: int, context_length: int) -> int:
        """Most tokens worth drafting: one fewer than the budget (the target adds one), never past the contexts."""
        if self.drafter is None:
            return 0
        room = min(self.max_length, self.drafter.max_length, self.rope.end(context_length)) - context_length
        return max(0, min(self.max_gamma, remaining - 1, room))

    def _forward(self, tokens: list[int], cache: KVCache, keep: int, pending: torch.Tensor | None) -> torch.Tensor:
        """Run the target over ``tokens`` and the drafts of ``pending``; return the last ``keep`` rows of logits."""
        if self.graphs is not None and isinstance(cache, StaticKVCache):
            return self.graphs.read(tokens, cache, keep, pending)
        return backend_of(self.target).forward(tokens, cache, keep, None if pending is None else pending[:, 0])

    def _step(self, row: Row, cache: KVCache, on_logits: Callable[[torch.Tensor], None] | None) -> list[int]:
        """Draft, verify and commit once; return the new tokens."""
        started, lag, captures = perf_counter(), 1 if self.drafter is None else self.drafter.lag, self._captures()
        threads = backend_of(self.target).threads
        pending, asked = self._draft(row, lag)
        unread, n, tokens = self._verify(row, cache, pending, on_logits)
        outcome = self._commit(row, cache, lag, asked, pending is not None, n, tokens)
        # A forward that read the prompt too says nothing of what a step takes, nor does one that recorded a graph, ran
        # on other threads than the draft, or read drafts after an end.
        outcome.threads = backend_of(self.target).threads
        usual = (
            self._captures() == captures
            and outcome.threads == threads
            and (pending is None or len(row.step.tokens) == row.step.gamma)
        )
        row.learn(outcome, perf_counter() - started, typical=unread == 1 and usual, draft_typical=usual)
        return tokens

    def _captures(self) -> int:
        """Return how many graphs were recorded so far."""
        return sum(g.captures for g in (self.graphs, getattr(self.drafter, "graphs", None)) if g is not None)

    def _draft(self, row: Row, lag: int) -> tuple[torch.Tensor | None, float]:
        """Decide and draft; return drafts that are still on the device, if any, and the policy's seconds on the way."""
        step, drafter = row.step, self.drafter
        step.decide(self.limit(row.remaining, row.history.context_length), row.remaining, drafter, lag)
        self._clock.draft()
        deciding, pending = row.policy.deciding, None
        if drafter is not None:
            pending = draft_async(step, drafter)
            if pending is None:
                draft(step, drafter)
        return pending, row.policy.deciding - deciding

    def _verify(
        self,
        row: Row,
        cache: KVCache,
        pending: torch.Tensor | None,
        on_logits: Callable[[torch.Tensor], None] | None,
    ) -> tuple[int, int, list[int]]:
        """Read the drafts with the target: return how many of the text's tokens it read, n, and the new tokens."""
        step, clock, drafter = row.step, self._clock, self.drafter
        clock.verify()
        self.rope.restart(cache, row.history.context_length)
        unread = row.sequence.tokens[
            len(cache) - cache.unseen :
        ]  # the latest token; in the first step the whole prompt
        width = step.gamma if pending is not None else len(step.tokens)
        logits = self._forward([*unread, *step.tokens], cache, 1 + width, pending)
        if len(cache) < row.history.context_length:
            raise UserError("the target keeps no key-value cache (it does not while it trains): call its eval()")
        if on_logits is not None:
            on_logits(logits)
        if pending is not None:
            n, following = judge_async(step, logits, pending, cast(ModelDrafter, drafter), clock)
            tokens = row.sequence.append([*step.tokens[:n], following])
        else:
            clock.launched()
            proposals = drafter.proposals[: len(step.tokens)] if drafter is not None else ()
            n, tokens = row.sequence.settle(logits, step.tokens, proposals)
        clock.done()
        return len(unread), n, tokens

    def _commit(
        self, row: Row, cache: KVCache, lag: int, asked: float, was_ahead: bool, n: int, tokens: list[int]
    ) -> Outcome:
        """End the step, of whose drafts n were accepted and which added ``tokens``."""
        step, drafter, length = row.step, self.drafter, row.history.context_length
        cache.truncate(length + len(tokens) - 1)
        unused = getattr(drafter, "unused", 0)  # of a drafter that drafts by the chunk
        if drafter is not None:
            drafter.end(min(n, len(tokens)))
            drafter.extend(tokens)
        k = len(step.tokens)
        draft_seconds, verify_seconds = self._clock.seconds()
        return row.commit(
            tokens, n, forwards=k if was_ahead else step.lookups[:-1].count(0.0) + unused, lag=lag,
            exhausted=is_exhausted(step.drafter, k, step.lookups), draft_seconds=draft_seconds - asked,
            verify_seconds=verify_seconds,
        )  # fmt: skip
