"""What is kept of one policy's course through the phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from speckv_online.stats import Estimate


@dataclass(frozen=True)
class Alarm:
    """A drift alarm: which detector, at which step and prompt of the stream, and in which phase."""

    detector: str
    step: int
    prompt: int
    phase: int


@dataclass(frozen=True)
class Track:
    """One policy on the stream; lists have one entry per prompt in the order of decoding, and are measured.

    Attributes
    ----------
    tokens_per_second : list of float
    acceptance : list of (float or None)
        Steps whose first drafted token was accepted / steps that drafted.
    shares : dict of str to list of float
        Share of steps by number of drafted tokens.
    phases : list of dict
        Goodput of each phase with its interval over prompts, mean gamma, and steps to the first alarm of each detector.
    whole : Estimate
        Goodput over the whole stream, with its interval over prompts.
    over : dict of str to Estimate
        The same relative to every other policy, paired by prompt.
    """

    policy: str
    tokens_per_second: list[float]
    acceptance: list[float | None]
    shares: dict[str, list[float]]
    alarms: list[Alarm]
    phases: list[dict[str, Any]]
    whole: Estimate
    over: dict[str, Estimate]
