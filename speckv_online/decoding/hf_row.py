"""One prompt of a call of transformers' ``generate``: what draws its tokens, what stops it, and its logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from speckv_online.decoding.row import Row as DecodingRow
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import PaddedProcessor, Sampler, is_pure

#: Processors that were made for the prompts of a whole batch.
_BATCHED = (EncoderRepetitionPenaltyLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)
#: Criteria that look at one row and keep nothing of it.
_APART = {MaxTimeCriteria, StopStringCriteria}


def of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Return processors that give a row alone what they would give it in the batch."""
    if rows == 1:
        return processors
    found = LogitsProcessorList()
    for processor in processors:
        own: Any = copy.copy(processor)
        if isinstance(processor, _BATCHED):
            raise UserError(f"{type(processor).__name__} cannot be taken apart by rows: decode one prompt at a time")
        if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):
            own.prompt_ignore_length = own.prompt_ignore_length[row : row + 1]
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = own._prefix_allowed_tokens_fn
            own._prefix_allowed_tokens_fn = lambda _, ids, allowed=allowed: allowed(row, ids)
        found.append(own)
    return found


def taken_apart(processors: LogitsProcessorList, criteria: StoppingCriteriaList, has_eos: bool) -> bool:
    """Whether each row of a batch may be asked about by itself: nobody can tell that from plain decoding."""
    apart = all(is_pure(p) or type(p) is PrefixConstrainedLogitsProcessor for p in processors)
    return apart and (not criteria or (has_eos and all(type(c) in _APART for c in criteria)))


class Together:
    """Processors and criteria of one's own, asked about all rows of a batch at once, as plain decoding asks them.

    Parameters
    ----------
    processors, criteria
        As ``generate`` prepared them, without the criteria of length and end.
    input_ids : Tensor, shape (batch, length)
    pad : int
        What follows the end of a row.
    has_eos : bool
        Whether a row ends by itself; else, as in transformers, all rows go on until all have been stopped.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        input_ids: torch.Tensor,
        pad: int,
        has_eos: bool,
    ) -> None:
        self.processors, self.criteria, self.pad, self.has_eos = processors, criteria, pad, has_eos
        self.ids = input_ids
        self.stopped = torch.zeros(len(input_ids), dtype=torch.bool)

    def settle(
        self, rows: list[DecodingRow], logits: torch.Tensor, proposals: list[list[torch.Tensor | None]]
    ) -> list[tuple[int, list[int]]]:
        """See :class:`speckv_online.decoding.batch.Together`; it ends where one row's draft does."""
        accepted, new = [0] * len(rows), [list[int]() for _ in rows]
        for k in range(min(len(row.step.tokens) for row in rows) + 1):
            scores = logits.new_zeros((len(self.ids), logits.shape[-1]), dtype=torch.float32)
            scores[[row.number for row in rows]] = logits[:, k].float()
            scores = self.processors(self.ids, scores.to(self.ids.device))  # type: ignore[arg-type]
            tokens, going = [self.pad] * len(self.ids), True
            for i, row in enumerate(rows):
                sampler, drafts = row.sequence.sampler, row.step.tokens
                assert sampler is not None
                target, right = sampler.distribution(scores[row.number][None])[0], False
                if k < len(drafts):
                    token, right = sampler.judge(target, drafts[k], proposals[i][k])
                else:
                    token = sampler.draw(target)
                accepted[i] += right
                new[i] += row.sequence.append([token])
                tokens[row.number] = token
                going &= right
            self._ask(rows, tokens)
            if not going or any(row.sequence.finish for row in rows):
                break
        return list(zip(accepted, new, strict=True))

    def _ask(self, rows: list[DecodingRow], tokens: list[int]) -> None:
        """Ask the criteria about all rows with these tokens appended, and end those that they stop."""
        column = torch.tensor(tokens, dtype=self.ids.dtype, device=self.ids.device)
        self.ids = torch.cat((self.ids, column[:, None]), 1)
        self.stopped |= self.criteria(self.ids, None).cpu()
        for row in rows:
            if self.stopped[row.number] and (self.has_eos or bool(self.stopped.all())):
                row.sequence.finish = row.sequence.finish or "stop"


class Row:
    """One prompt of a call: its sampler, its stopping criteria, and its logits if they are asked for."""

    def __init__(
        self,
        prompt: list[int],
        pads: list[int],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        device: torch.device,
        keep_logits: bool,
        always_sampler: bool = False,
    ) -> None:
        self.prompt, self.pads, self.criteria = prompt, pads, criteria
        # Processors and criteria see the padding, as they do in transformers: some of them count tokens.
        self.processors = LogitsProcessorList(PaddedProcessor(p, pads) for p in processors) if pads else processors
        greedy = not config.do_sample
        generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )
        self.sampler: Sampler | None = None
        if processors or not greedy or always_sampler:
            self.sampler = Sampler(0.0 if greedy else 1.0, processors=self.processors, seed=generator)
        self.device = device
        self.logits: list[torch.Tensor] = []
        self._pending = torch.empty(0)
        self._keep, self._scores = keep_logits, list[torch.Tensor]()
        self._want_scores = keep_logits and bool(config.output_scores)
        if self._want_scores and self.sampler is not None:
            self.sampler.kept, self.sampler.in_order = self._scores, True

    def see(self, logits: torch.Tensor) -> None:
        """Take in the logits of a step, before its tokens are known."""
        self._pending = logits.float().clone()

    def on_tokens(self, streamer: BaseStreamer | None) -> Any:
        """Return what to call after each step, or None."""
        if streamer is None and not self._keep:
            return None

        def take(tokens: list[int]) -> None:
            if self._keep:
                self.logits += self._pending[: len(tokens)].split(1)
                self._pending = self._pending[:0]
            if streamer is not None:
                streamer.put(torch.tensor(tokens))

        return take

    def scores(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Return the processed scores, each of shape (1, vocab), that new tokens were chosen by."""
        if self.sampler is not None:
            return self._scores  # the sampler keeps them there: processors are asked once
        rows = [*self.logits, *self._pending.split(1)] if len(self._pending) else self.logits
        return rows[: len(tokens)]

    def should_stop(self, tokens: list[int]) -> bool:
        """Ask the stopping criteria about a sequence."""
        ids = torch.tensor([[*self.pads, *tokens]], device=self.device)
        scores = tuple(self.scores(tokens[len(self.prompt) :])) if self._want_scores else None
        return bool(self.criteria(ids, scores).any())
