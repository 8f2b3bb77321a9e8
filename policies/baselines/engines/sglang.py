"""SGLang 0.5.23's adaptive number of draft steps (``srt/speculative/adaptive_spec_params.py``, default strategy).

Batches of 1, 8, 32 and 64 requests have a slot each: tiers of gamma, an average accepted length e, and a count. A
batch belongs to the slot of the largest such size that it reaches. Every step e <- 0.8 e + 0.2 n, with n the mean of
the batch; at gamma 0 it stays. After ten steps of warm-up, every fifth: down while e <= (tier below) - 0.5 + d, where
the tier 0 counts as 1 and d is -0.25 in the slot of 1 and 0 in the others; if that moved nothing, up while e > tier -
0.5. From gamma 0 the next review tries the tier above.

Different here: a batch's size is read from the level's name, where it is rounded up to a power of two (SGLang pads to
the sizes of its CUDA graphs). Drafts that the end of a budget cut to nothing are left out.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.baselines.engines.engine_steps import EngineSteps
from policies.estimators.bayesian_linear import check_array
from policies.level_features import batch_size

WARM_UP, INTERVAL = 10, 5
#: Tiers, and what is added to the bound below which a slot goes down, by the smallest batch of the slot.
LARGER = {8: ((0, 1, 3), 0.0), 32: ((0, 1), 0.0), 64: ((0,), 0.0)}


class _Slot:
    """Tiers of one range of batch sizes, and where among them it is."""

    def __init__(self, tiers: tuple[int, ...], down: float, start: int) -> None:
        self.tiers, self.down = tiers, down
        self.tier = tiers.index(start) if start in tiers else len(tiers) // 2
        self.average, self.steps = self.gamma - 1.0, 0

    @property
    def gamma(self) -> int:
        return self.tiers[self.tier]

    def update(self, accepted: list[int]) -> None:
        """Take in the accepted lengths of one step's sequences."""
        if self.gamma:
            self.average = 0.8 * self.average + 0.2 * (sum(accepted) / len(accepted))
        self.steps += 1
        if self.steps > WARM_UP and (self.steps - WARM_UP) % INTERVAL == 0:
            self._review()

    def _review(self) -> None:
        before, tiers = self.tier, self.tiers
        if not self.gamma:
            self.tier = min(before + 1, len(tiers) - 1)
            if self.gamma and self.average < 0.0:
                self.average = self.gamma - 1.0
            return
        while self.tier > 0 and self.average <= max(tiers[self.tier - 1], 1) - 0.5 + self.down:
            self.tier -= 1
        if self.tier == before:
            while self.tier < len(tiers) - 1 and self.average > tiers[self.tier] - 0.5:
                self.tier += 1


class SgLang(Policy):
    """Move between tiers of gamma by the average accepted length, for each range of batch sizes.

    Parameters
    ----------
    start : int
        The first tier, ``--speculative-num-steps``; where a slot lacks it, the middle one.
    tiers : tuple of int
        Gammas of the slot of single requests; those of larger batches are SGLang's.
    """

    summary = "SGLang's adaptive tiers of gamma by the average accepted length"
    learns = True
    positional: ClassVar[str] = "start"

    def __init__(
        self, *, start: int = 3, tiers: tuple[int, ...] = (1, 3, 5, 7), seed: int = 0, worker: int = 0
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not tiers or list(tiers) != sorted(set(tiers)) or tiers[0] < 0 or tiers[-1] > MAX_GAMMA:
            raise PolicyError(f"tiers must be different gammas from 0 to {MAX_GAMMA} in rising order, got {tiers}")
        if start not in tiers:
            raise PolicyError(f"start must be one of the tiers {tiers}, got {start}")
        self.slots = {1: _Slot(tiers, -0.25, start)}
        self.slots |= {size: _Slot(*slot, start) for size, slot in LARGER.items()}
        self._steps = EngineSteps()

    def slot(self, level: str) -> _Slot:
        """Return the slot of a level's batch size."""
        size = batch_size(level)
        return self.slots[max(least for least in self.slots if least <= size)]

    def decide(self, context: Context) -> Decision:
        self._step(self._steps.take())
        return Decision(self.new_id(), min(self.slot(context.level).gamma, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id):
            self._step(self._steps.add(decision, outcome))

    def _step(self, step: list[tuple[Decision, Outcome]]) -> None:
        if not step:
            return
        slot = self.slot(step[-1][1].level)
        accepted = [outcome.accepted for _, outcome in step if outcome.drafted or not slot.gamma]
        if accepted:
            slot.update(accepted)

    def state_dict(self) -> State:
        self._step(self._steps.take())
        return {"sglang": np.array([[s.tier, s.average, s.steps] for s in self.slots.values()], dtype=float)}

    def load_state_dict(self, state: State) -> None:
        rows = check_array(state, "sglang", (len(self.slots), 3)).tolist()
        for slot, (tier, _, _) in zip(self.slots.values(), rows, strict=True):
            if not 0 <= tier < len(slot.tiers):
                raise PolicyError(
                    f"the state's tier {tier:g} does not exist here: load it with the tiers it was saved with"
                )
        for slot, (tier, average, steps) in zip(self.slots.values(), rows, strict=True):
            slot.tier, slot.average, slot.steps = int(tier), average, int(steps)
        self._steps.take()
