"""A policy for transformers' own assisted generation: ``generate(assistant_model=...)`` with gamma set in every step.

For people who stay with transformers' loop. It is slower than :class:`~speckv_online.decoding.SpeculativeDecoder`, as
every draft is a call of the assistant's ``generate``, and takes whatever that loop takes. That loop asks processors
about drafts as well: those that keep a state, or know only some prefixes, need the other decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, NGRAM, Policy
from speckv_online.decoding.generation import Generation, Totals
from speckv_online.decoding.hf_cache import given_cache, split
from speckv_online.decoding.inputs import as_policy
from speckv_online.decoding.row import Row
from speckv_online.decoding.sequence import TokenSequence
from speckv_online.learned.identity import ASSISTED
from speckv_online.learned.memory import make_memory
from speckv_online.lookup.ngram_index import NgramIndex
from speckv_online.modeling.introspection import level_of
from speckv_online.speculation import Unknown


class PolicyAssistant:
    """Lets a policy set the number of assistant tokens of every call.

    Parameters
    ----------
    policy : Policy or str
        A policy, or a spec such as ``"online"``.
    level : str, optional
        The target's compression level; by default read off the model.
    task : str
        Task label for the policy.
    remember : bool or str
        As for :class:`~speckv_online.decoding.decoder.SpeculativeDecoder`.

    Attributes
    ----------
    last : Generation
        Steps of the latest prompt (its ``tokens`` are those that steps added; criteria may have ended it earlier).
    totals : Totals
        Sums over all prompts but the latest.

    Examples
    --------
    ::

        assistant = PolicyAssistant("online")
        with assistant.attached_to(model):
            model.generate(**inputs, assistant_model=draft, max_new_tokens=100)
        print(assistant.last.goodput)
    """

    def __init__(
        self, policy: Policy | str, *, level: str | None = None, task: str = "", remember: bool | str = False
    ) -> None:
        self.policy, self.level, self.task = as_policy(policy), level, task
        self.memory = make_memory(policy, self.policy, remember)
        self.last, self.totals = Generation(), Totals()
        self._remembered = self.last

    @contextmanager
    def attached_to(self, model: PreTrainedModel) -> Iterator[PolicyAssistant]:
        """Set gamma in every assisted generation of this model while the context lasts.

        ``generate`` has no argument for a candidate generator: it asks the model for one. This model answers with one
        that the policy governs; the class, and every other model, stays as it is.
        """
        owner: Any = model  # modules are typed as holding tensors and modules only
        replaced = ("_get_candidate_generator", "prepare_inputs_for_generation")
        outer = {name: vars(owner)[name] for name in replaced if name in vars(owner)}
        usual, prepare = (getattr(owner, name) for name in replaced)
        repeated = 0  # tokens of the coming call's ids that a cache of the caller's holds

        def get_candidate_generator(**arguments: Any) -> Any:
            found = usual(**arguments)
            if type(found) is not AssistedCandidateGenerator:
                return found  # prompt lookup, or two tokenizers: no draft of one token at a time
            for name in ("target_tokenizer", "assistant_tokenizer"):
                arguments.pop(name, None)
            nonlocal repeated
            repeated, unseen = held_before(**arguments)
            level = self.level or level_of(model)
            self._remember()
            if self.memory is not None:
                self.memory.begin(model, arguments["assistant_model"], level, engine=ASSISTED)
            return PolicyCandidates(self, level, unseen, **arguments)

        @wraps(prepare)  # transformers reads the signature
        def prepare_inputs(input_ids: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            # transformers (5.23) slices the ids of plain decoding here, and forgets those of assisted decoding.
            nonlocal repeated
            if repeated and arguments.get("is_first_iteration") and arguments.get("next_sequence_length") is None:
                arguments["next_sequence_length"], repeated = input_ids.shape[1] - repeated, 0
            return prepare(input_ids, *args, **arguments)

        owner._get_candidate_generator, owner.prepare_inputs_for_generation = get_candidate_generator, prepare_inputs
        try:
            yield self
        finally:
            self._remember()
            for name in replaced:
                delattr(owner, name)
            for name, found in outer.items():
                setattr(owner, name, found)

    def _remember(self) -> None:
        """Hand the latest prompt to the memory, once."""
        if self.memory is not None and self.last is not self._remembered:
            self.memory.end([self.last])
            self._remembered = self.last

    def begin(self) -> Generation:
        """Start the records of a prompt."""
        if self.last.steps:
            self.totals.add(self.last)
        self.last = Generation()
        return self.last


def held_before(
    input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **_: Any
) -> tuple[int, int]:
    """Return how many of the ids a cache of the caller's holds, and how many tokens before them."""
    cache = given_cache(model_kwargs)
    if cache is None:
        return 0, 0
    (prompt,) = split(input_ids, model_kwargs.get("attention_mask"), cache, generation_config)
    return (0, prompt.unseen) if prompt.unseen else (int(cache.get_seq_length()), 0)


#: Logits between the best two tokens that signals show at most.
MOST_MARGIN = 40.0
#: More tokens than any cache holds.
ALL = 1 << 62


class PolicyCandidates(AssistedCandidateGenerator):
    """transformers' candidate generator for one prompt, with the policy in place of its schedules."""

    def __init__(
        self, owner: PolicyAssistant, level: str, unseen: int, input_ids: torch.Tensor, **arguments: Any
    ) -> None:
        super().__init__(input_ids=input_ids, **arguments)  # type: ignore[arg-type]
        # The policy replaces the schedule and the confidence threshold.
        self.assistant_generation_config.num_assistant_tokens_schedule = "constant"
        self.assistant_generation_config.assistant_confidence_threshold = 0.0
        self.generation_config.assistant_confidence_threshold = 0.0
        sampled, tokens = bool(self.generation_config.do_sample), input_ids[0].tolist()
        eos = self.generation_config.eos_token_id
        ends = [eos] if isinstance(eos, int) else eos or ()
        self.row = Row(
            owner.policy, TokenSequence(tokens, frozenset(ends)), level=level, task=owner.task,
            budget=self.main_model_max_length, max_gamma=MAX_GAMMA, sampled=sampled, unseen=unseen,
        )  # fmt: skip
        self.row.out = owner.begin()
        self.proposer = Unknown()
        self.ngrams = NgramIndex(tokens)
        self.forwards, self.valid = 0, ALL
        self.row.begin()

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Decide, and draft as many tokens; see the base class."""
        step, length = self.row.step, input_ids.shape[1]
        remaining = self.main_model_max_length - length
        self.started = perf_counter()
        past: Any = self.assistant_kwargs.get("past_key_values")
        self.lag = length - (min(past.get_seq_length(), self.valid) if past is not None else 0)
        most = max(0, min(MAX_GAMMA, remaining - 1))
        self.num_assistant_tokens = step.decide(most, remaining, self.proposer, self.lag)
        found: tuple[Any, Any] = super().get_candidates(input_ids, **kwargs)
        ids, logits = found
        self._note(ids, logits, length)
        self.forwards = drafted = len(step.tokens)
        kept = step.submit()
        if kept < drafted:
            ids, logits = ids[:, : length + kept], logits[:, :kept] if kept and logits is not None else None
        self.drafted_at = perf_counter()
        return ids, logits

    def _update_past_and_masks(self, input_ids: Any, *args: Any, **kwargs: Any) -> bool:
        past: Any = self.assistant_kwargs.get("past_key_values")
        if past is not None:
            surplus = past.get_seq_length() - min(self.valid, input_ids.shape[1] - 2)
            if surplus > 0:
                past.crop(-surplus)
        self.valid = ALL
        has_past = super()._update_past_and_masks(input_ids, *args, **kwargs)
        if not has_past:  # steps without drafting came before the first draft, which the base class does not expect
            length, mine = input_ids.shape[1], self.assistant_kwargs
            for prepare in (_prepare_attention_mask, _prepare_position_ids):
                mine = prepare(mine, length, self.assistant_model.config.is_encoder_decoder)
            self.assistant_kwargs = _prepare_token_type_ids(mine, length)
        return has_past

    def _prepare_generation_args(self, input_ids: Any, min_new_tokens: int, max_new_tokens: int) -> dict[str, Any]:
        arguments = super()._prepare_generation_args(input_ids, min_new_tokens, max_new_tokens)
        if self.row.step.decision.ask_per_token:
            arguments["stopping_criteria"] = StoppingCriteriaList([_Stop(self, input_ids.shape[1])])
        return arguments

    def _note(self, ids: torch.Tensor, logits: torch.Tensor | None, length: int) -> bool:
        """Take in the drafts that are not known yet; return whether to draft on.

        ``logits`` are the assistant's scores, shape (1, k, vocab), with temperature, cuts and penalties applied:
        those of the model alone are not handed out.
        """
        step, new, go_on = self.row.step, ids[0, length:].tolist(), True
        for i in range(len(step.tokens), min(len(new), MAX_GAMMA)):
            assert logits is not None
            row = logits[0, i].float()
            top = row.topk(2).values
            p = row.softmax(-1)
            margin = (top[0] - top[1]).clamp(max=MOST_MARGIN)  # infinite where cuts leave one token
            wanted = torch.stack((torch.special.entr(p).sum() / math.log(2), p.amax(), margin)).tolist()
            step.signals[i, [ENTROPY, CONFIDENCE, MARGIN]] = wanted
            step.signals[i, NGRAM] = self.ngrams.signal(step.tokens, new[i])
            go_on = step.add(new[i])
        return go_on

    def go_on(self, ids: torch.Tensor, scores: Any, length: int) -> bool:
        """Return whether to draft on after the assistant's tokens so far."""
        return self._note(ids, torch.stack(tuple(scores), dim=1), length)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
        """Teach the policy what the step was; see the base class."""
        now, n, row, step = perf_counter(), int(num_matches), self.row, self.row.step
        tokens = input_ids[0, len(row.sequence.tokens) :].tolist()
        # transformers does not count an end of sequence among the drafts as a match.
        n += len(tokens) <= len(step.tokens) and n < len(step.tokens) and tokens[-1] == step.tokens[n]
        first = not row.out.steps
        outcome = row.commit(
            tokens, n, forwards=self.forwards, lag=self.lag, exhausted=False,
            draft_seconds=self.drafted_at - self.started - row.policy.deciding, verify_seconds=now - self.drafted_at,
        )  # fmt: skip
        self._forget(len(row.sequence.tokens) + outcome.accepted)
        # The first verification reads the prompt too: its time is no usual step's.
        row.learn(outcome, now - self.started, typical=not first)
        row.sequence.tokens += tokens
        self.ngrams.extend(tokens)

    def _forget(self, length: int) -> None:
        """Note how much of the assistant's cache is of the text: rejected drafts go when the next draft begins.

        The base class counts on every step drafting something. Cropping here and there would crop twice, which caches
        with a sliding window do not take.
        """
        self.valid = min(self.valid, length)


class _Stop(StoppingCriteria):
    """Ends the assistant's draft where the policy says so."""

    def __init__(self, candidates: PolicyCandidates, length: int) -> None:
        self.candidates, self.length = candidates, length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = not self.candidates.go_on(input_ids, scores, self.length)
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)
