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
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from speckv_online.errors import UserError
from speckv_online.modeling.sampling import Sampler

#: Processors that were made for the prompts of a whole batch.
_BATCHED = (EncoderRepetitionPenaltyLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)


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
    ) -> None:
        self.prompt, self.pads, self.criteria = prompt, pads, criteria
        # Processors and criteria see the padding, as they do in transformers: some of them count tokens.
        self.processors = LogitsProcessorList(_Padded(p, pads) for p in processors) if pads else processors
        greedy = not config.do_sample
        generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )
        self.sampler: Sampler | None = None
        if processors or not greedy:
            self.sampler = Sampler(0.0 if greedy else 1.0, processors=self.processors, seed=generator)
        self.device = device
        self.logits: list[torch.Tensor] = []
        self._pending = torch.empty(0)
        self._keep, self._scores = keep_logits, list[torch.Tensor]()
        self._want_scores = keep_logits and bool(config.output_scores)

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
        rows = [*self.logits, *self._pending.split(1)] if len(self._pending) else self.logits
        ids = torch.tensor([[*self.prompt, *tokens]], device=self.device)
        for i in range(len(self._scores), len(tokens)):
            prefix: Any = ids[:, : len(self.prompt) + i]
            self._scores.append(self.processors(prefix, rows[i].clone()))
        return self._scores

    def should_stop(self, tokens: list[int]) -> bool:
        """Ask the stopping criteria about a sequence."""
        ids = torch.tensor([[*self.pads, *tokens]], device=self.device)
        scores = tuple(self.scores(tokens[len(self.prompt) :])) if self._want_scores else None
        return bool(self.criteria(ids, scores).any())


class _Padded(LogitsProcessor):
    """A processor that sees the padding before the prompt."""

    def __init__(self, inner: LogitsProcessor, pads: list[int]) -> None:
        self.inner, self.pads = inner, torch.tensor([pads])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pads = self.pads.to(input_ids.device)
        return self.inner(torch.cat((pads, input_ids), dim=1), scores)
