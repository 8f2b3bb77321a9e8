"""Peers to be measured beside: transformers' own assisted generation, as its users run it today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from speckv_online.models.distilled_draft import load_shipped_draft
from speckv_online.models.pairs import load_target, pick_device, prepare


@dataclass(frozen=True)
class Schedule:
    """How transformers sets the number of assistant tokens.

    Attributes
    ----------
    name : str
        For reports.
    tokens : int
        ``num_assistant_tokens``; 0 decodes without the assistant.
    schedule : str
        ``constant`` or ``heuristic``.
    threshold : float
        ``assistant_confidence_threshold``: drafting stops below it, 0 switches that off.
    """

    name: str
    tokens: int
    schedule: str = "constant"
    threshold: float = 0.0


#: transformers' plain decoding, its constant-4, its heuristic, and its default (cap 20; the threshold adapts where
#: scikit-learn is installed).
SCHEDULES = {
    s.name: s
    for s in (
        Schedule("transformers", 0),
        Schedule("transformers:constant-4", 4),
        Schedule("transformers:heuristic", 5, "heuristic"),
        Schedule("transformers:default", 20, "constant", 0.4),
    )
}


class Stock:
    """transformers' own ``generate`` with the default pair, nothing of ours in between.

    Parameters
    ----------
    pair, level, device : str
        As for :func:`speckv_online.models.load_pair`. The draft gets the whole head, which ``assistant_model=`` needs.
    reached : dict of Schedule to int, optional
        Number of assistant tokens that each schedule has reached: transformers' heuristic goes on from call to call.
    """

    def __init__(self, pair: str, level: str, device: str = "auto", reached: dict[Schedule, int] | None = None) -> None:
        self.reached = {} if reached is None else reached
        folder, where = prepare(pair), pick_device(device)
        self.target: Any = load_target(folder, level, device)
        self.draft = load_shipped_draft(folder, where, full_head=True)[0]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, schedule: Schedule) -> tuple[list[int], float]:
        """Decode greedily; return the new tokens and the seconds of the whole call, prompt included."""
        ids = torch.tensor([list(prompt)], device=self.target.device)
        options: dict[str, Any] = {}
        if schedule.tokens:
            config = self.draft.generation_config
            config.num_assistant_tokens_schedule = schedule.schedule
            config.num_assistant_tokens = self.reached.get(schedule, schedule.tokens)
            config.assistant_confidence_threshold = schedule.threshold
            options = {"assistant_model": self.draft}
        started = perf_counter()
        out = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.target.generation_config.eos_token_id,
            **options,
        )
        tokens = out[0, len(prompt) :].tolist()  # also waits for a GPU
        seconds = perf_counter() - started
        if schedule.tokens:
            self.reached[schedule] = int(self.draft.generation_config.num_assistant_tokens)
        return tokens, seconds
