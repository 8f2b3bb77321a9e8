"""What decoding gave: the tokens, the records of steps, and their sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from speckv_online.io.step_records import StepRecord


@dataclass(slots=True)
class Generation:
    """What decoding one prompt gave.

    Attributes
    ----------
    tokens : list of int
        New tokens, an end-of-sequence token included.
    steps : list of StepRecord
        One record per step; their ``produced`` add up to ``len(tokens)``.
    prefill_seconds, seconds : float
        Time to read the prompt, see :meth:`charge_prompt`, and time of the whole call. In a batch each prompt is
        charged its share.
    finish : str
        ``"eos"``, ``"stop"`` (asked by ``should_stop``) or ``"length"``.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    finish: str = "length"

    def charge_prompt(self) -> None:
        """Split the seconds of the forward that read the prompt and verified the first step's drafts in one.

        The step keeps what the later verifications took in the median, ``prefill_seconds`` gets the rest, so that the
        sum is what was measured. A call of one step has no other verification to go by and keeps all in the step.
        """
        if len(self.steps) > 1:
            first, *later = self.steps
            rest = max(first.verify_seconds - median(s.verify_seconds for s in later), 0.0)
            first.verify_seconds -= rest
            first.seconds -= rest
            self.prefill_seconds += rest

    @property
    def decode_seconds(self) -> float:
        """Seconds of all steps together, prefill left out."""
        return sum(s.seconds for s in self.steps)

    @property
    def goodput(self) -> float:
        """Tokens per second of decoding, prefill left out."""
        return len(self.tokens) / max(self.decode_seconds, 1e-12)

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens; NaN if nothing was drafted."""
        drafted = sum(s.drafted for s in self.steps)
        return sum(s.accepted for s in self.steps) / drafted if drafted else float("nan")


@dataclass(slots=True)
class Totals:
    """Sums over all prompts that a decoder has seen."""

    prompts: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def add(self, generation: Generation) -> None:
        """Count one prompt."""
        self.prompts += 1
        self.tokens += len(generation.tokens)
        self.steps += len(generation.steps)
        self.drafted += sum(s.drafted for s in generation.steps)
        self.accepted += sum(s.accepted for s in generation.steps)
        self.seconds += generation.decode_seconds

    @property
    def goodput(self) -> float:
        """Tokens per second of decoding, prefill left out."""
        return self.tokens / max(self.seconds, 1e-12)

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens; NaN if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")
