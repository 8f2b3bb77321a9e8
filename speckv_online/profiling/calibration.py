"""Measure what a step costs before anything is timed for real: warm-up and calibration in one short run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from policies.base import Context, Decision, Policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.io.step_records import StepRecord
from speckv_online.simulate.cost_table import LevelCost, fit_level

#: A prompt to warm up and calibrate with.
WARM_UP = "Write a short note that thanks a colleague for their help with a project."
GAMMAS = (0, 1, 2, 4, 8)
#: Timed steps per gamma, at least and at most; in between, as many as fit into SECONDS. On a machine that others use,
#: a median of three tells of the moment, and policies take long to forget a shape that they were told.
LEAST, MOST = 3, 24
SECONDS = 3.0


class _Cycle(Policy):
    """Play :data:`GAMMAS` in turn, from the second one on: the first step of a text is to draft."""

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), GAMMAS[(context.step + 1) % len(GAMMAS)])


def calibrate(target: PreTrainedModel, drafter: Drafter, level: str, prompt_ids: Sequence[int]) -> LevelCost:
    """Return the seconds per drafted token, per verify width and per prompt token of a loaded pair, as medians.

    The first step at every gamma warms caches and kernels up and is no data. The end of the sequence is ignored, since
    only the time counts.

    Parameters
    ----------
    target, drafter, level
        As for :class:`~speckv_online.decoding.SpeculativeDecoder`.
    prompt_ids : sequence of int
        Any prompt.
    """
    decoder = SpeculativeDecoder(drafter, policy=_Cycle(), target=target, level=level)
    cycle, repeats = len(GAMMAS), LEAST
    steps: list[StepRecord] = []
    while (missing := cycle * (1 + repeats) - len(steps)) > 0:  # a step gives at least one token
        steps += decoder.generate(prompt_ids, missing + max(GAMMAS), eos_ids=()).steps
        if timed := [step.seconds for step in steps[cycle:]]:
            repeats = min(max(LEAST, int(SECONDS * len(timed) / (cycle * sum(timed)))), MOST)
    again = decoder.generate(prompt_ids, 2, eos_ids=()).steps[:1]  # to see what the draft takes to read a prompt
    return fit_level([*steps[cycle : cycle * (1 + repeats)], *again])
