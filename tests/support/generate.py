"""transformers' generate, with our decoder and without."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from speckv_online.decoding.decoder import SpeculativeDecoder
from tests.support.decoding import Scripted
from tests.support.tiny_models import TinyPair


def inputs_of(*prompts: list[int], pads: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and mask, padded on the left by ``pads`` more than the longest needs."""
    width = max(map(len, prompts)) + pads
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def decoder_of(pair: TinyPair, gammas: list[int] | None = None, **options: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.draft, policy=Scripted(gammas or [4, 0, 7, 2]), **options)


class Favour(LogitsProcessor):
    """A processor that looks at the whole prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % 250 + 1] += 4.0
        return scores


class Collect(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True
