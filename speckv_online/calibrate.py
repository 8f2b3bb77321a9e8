"""Measure what a step costs before anything is timed for real: warm-up and calibration in one short run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from policies.base import Context, Decision, Policy
from speckv_online.cost import LevelCost, fit_level
from speckv_online.decoding import SpeculativeDecoder
from speckv_online.drafters import Drafter
from speckv_online.records import StepRecord

GAMMAS = (0, 1, 2, 4, 8)


class _Cycle(Policy):
    """Play some gammas in turn."""

    def __init__(self, gammas: Sequence[int]) -> None:
        super().__init__()
        self.gammas = tuple(gammas)

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), self.gammas[context.step % len(self.gammas)])


def calibrate(
    target: PreTrainedModel,
    drafter: Drafter,
    level: str,
    prompt_ids: Sequence[int],
    *,
    gammas: Sequence[int] = GAMMAS,
    repeats: int = 3,
) -> LevelCost:
    """Return the seconds per drafted token and per verify width of a loaded pair, as medians.

    The first step at every gamma warms caches and kernels up and is no data. The end of the sequence is ignored, since
    only the time counts.

    Parameters
    ----------
    target, drafter, level
        As for :class:`~speckv_online.decoding.SpeculativeDecoder`.
    prompt_ids : sequence of int
        Any prompt.
    gammas : sequence of int
        Speculation lengths to time.
    repeats : int
        Timed steps per gamma.
    """
    decoder = SpeculativeDecoder(drafter, policy=_Cycle(gammas), target=target, level=level)
    warm, wanted = len(gammas), len(gammas) * (1 + repeats)
    steps: list[StepRecord] = []
    while len(steps) < wanted:  # a step gives at least one token, and more where drafts are right
        steps += decoder.generate(prompt_ids, wanted - len(steps) + max(gammas), eos_ids=()).steps
    return fit_level(steps[warm:wanted])
