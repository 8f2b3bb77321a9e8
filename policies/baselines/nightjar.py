"""Nightjar: a bandit over gamma for each batch size, ADA-BINGREEDY (Li et al., 2025, arXiv 2512.22420 v3).

Sources: summaries of the paper's text, and its authors' fork of vLLM 0.8.2 (lihuahua123/vllm_speculative, commit
8913e733, class ``ADABinGreedy``).

Every batch size has a bandit of its own. Time goes in blocks of 2^(j - 1) steps, and a block in bins of as many steps
as the root of its length. Bin b of a block explores with probability 1 / b: gamma is drawn from 0 to the most. Any
other bin takes the gamma of the least seconds per token, 1 / g. There g is the mean of what a sequence got per second.
To go from gamma 0 to another one costs C / gamma more, with C the seconds of the draft's catching up. A bin keeps its
gamma.

What the source leaves open, and what we chose:

- The chance to explore is 1 / b in the text, which its bound on the regret needs, and 1 / sqrt(b) in the code. The
  default is the text's; ``decay=0.5`` is the code's.
- The code draws anew in every step of a bin, with weights set by hand, among them none for gamma 0 in small batches.
  Here draws are even, and a bin keeps what was drawn, as in the text.
- C is a table there, measured beforehand by skipped tokens and batch size. Here it is the mean of what drafting took,
  beyond its usual seconds per forward, in steps of a sequence that had drafted nothing just before.
- Batch sizes are those in the level's name, rounded up to powers of two; the code pairs neighbours. Levels are kept
  apart, since their seconds are.
- The most that is drafted is 3, as in the code's scripts. A gamma that was not measured yet waits for a draw; the code
  gives it next to no reward, which is the same.
- A step counts when its outcome is in. One that the end of a budget cut, or whose seconds are not known, counts but
  teaches nothing. Moving the draft model out of the GPU's memory under load is no affair of a policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.baselines.engines.engine_steps import EngineSteps
from policies.costs.cost_model import split_levels
from policies.estimators.bayesian_linear import check_array


def _known(seconds: Iterable[float]) -> bool:
    """Return whether all of these times were measured."""
    return all(0.0 < s < math.inf for s in seconds)


class _Bins:
    """The bandit of one level and batch size."""

    def __init__(self, arms: int, decay: float, rng: np.random.Generator) -> None:
        self.decay, self.rng = decay, rng
        self.rates = np.zeros((2, arms))  # steps of each gamma, and its mean of tokens per second
        self.drafting = np.zeros(4)  # forwards and their seconds, restarts and their extra seconds
        self.block, self.bin, self.steps, self.gamma = 1, 0, 0, 0
        self._open()

    def _width(self) -> int:
        """Steps of a bin."""
        return math.isqrt(1 << (self.block - 1))

    def _open(self) -> None:
        """Begin a bin."""
        self.bin, self.steps = self.bin + 1, 0
        if (self.bin - 1) * self._width() >= 1 << (self.block - 1):
            self.block, self.bin = self.block + 1, 1
        explores = self.rng.random() < self.bin**-self.decay
        self.gamma = int(self.rng.integers(len(self.rates[0]))) if explores else self.best()

    def switch(self) -> float:
        """Seconds that drafting takes more after a rest."""
        _, _, restarts, extra = self.drafting.tolist()
        return extra / restarts if restarts else 0.0

    def best(self) -> int:
        """Return the gamma of the least seconds per token, those of switching on included."""
        n, rate = self.rates
        loss = np.where(n > 0, 1.0 / np.where(n > 0, rate, 1.0), np.inf)
        if not self.gamma:
            loss[1:] += self.switch() / np.arange(1, len(loss))
        return int(loss.argmin())

    def count(self) -> None:
        """Take in that a step is over."""
        self.steps += 1
        if self.steps >= self._width():
            self._open()

    def teach(self, gamma: int, rate: float) -> None:
        """Take in the tokens per second of a step."""
        self.rates[0, gamma] += 1.0
        self.rates[1, gamma] += (rate - self.rates[1, gamma]) / self.rates[0, gamma]

    def time(self, forwards: int, seconds: float, restarted: bool) -> None:
        """Take in what drafting took in a step."""
        usual, taken, _, _ = self.drafting.tolist()
        if not restarted:
            self.drafting[:2] += forwards, seconds
        elif usual:
            self.drafting[2:] += 1.0, max(seconds - forwards * taken / usual, 0.0)

    def state(self) -> State:
        place = np.array([self.block, self.bin, self.steps, self.gamma], dtype=float)
        return {"rates": self.rates.copy(), "drafting": self.drafting.copy(), "place": place}

    def load(self, state: State) -> None:
        rates, drafting = check_array(state, "rates", self.rates.shape), check_array(state, "drafting", (4,))
        block, at, steps, gamma = check_array(state, "place", (4,)).tolist()
        if not (1 <= block <= 60 and at >= 1 and steps >= 0 and 0 <= gamma < len(rates[0])):
            raise PolicyError(f"the state's block {block:g}, bin {at:g}, step {steps:g}, gamma {gamma:g} do not exist")
        self.rates, self.drafting = rates.copy(), drafting.copy()
        self.block, self.bin, self.steps, self.gamma = int(block), int(at), int(steps), int(gamma)


class Nightjar(Policy):
    """Explore in the early bins of growing blocks, else draft what gave the least seconds per token at the batch size.

    Parameters
    ----------
    most : int
        The largest gamma; all from 0 on are arms.
    decay : float
        Bin b of a block explores with probability b to the power of minus this.
    """

    summary = "Nightjar's bandit over gamma by batch size, exploring in bins of growing blocks"
    learns = True
    positional: ClassVar[str] = "most"

    def __init__(self, *, most: int = 3, decay: float = 1.0, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 1 <= most <= MAX_GAMMA or not 0 < decay < 10:
            raise PolicyError(f"need most from 1 to {MAX_GAMMA} and decay above 0 and below 10, got {most}, {decay}")
        self.most, self.decay = most, decay
        self.levels: dict[str, _Bins] = {}
        self._steps = EngineSteps()

    def bins(self, level: str) -> _Bins:
        """Return the bandit of a level, made on first use."""
        if level not in self.levels:
            self.levels[level] = _Bins(self.most + 1, self.decay, self.rng)
        return self.levels[level]

    def decide(self, context: Context) -> Decision:
        self._step(self._steps.take())
        gamma = self.bins(context.level).gamma
        cut = min(gamma, context.max_gamma)
        return Decision(self.new_id(), cut, features=(gamma, context.idle > 0))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id) and decision.features is not None:
            self._step(self._steps.add(decision, outcome))

    def _step(self, step: list[tuple[Decision, Outcome]]) -> None:
        """Take in a step of the whole batch."""
        if not step:
            return
        outcomes = [outcome for _, outcome in step]
        bins, gamma = self.bins(outcomes[-1].level), step[-1][0].features[0]
        drafting = [o for o in outcomes if o.forwards]
        if drafting and _known(o.draft_seconds for o in drafting):
            restarted = any(decision.features[1] for decision, o in step if o.forwards)
            bins.time(sum(o.forwards for o in drafting), sum(o.draft_seconds for o in drafting), restarted)
        whole = all(d.gamma == gamma and (o.drafted == gamma or o.exhausted) for d, o in step)
        if whole and _known(o.seconds for o in outcomes):
            tokens = sum(o.produced for o in outcomes) / len(step)
            bins.teach(gamma, tokens / sum(o.seconds for o in outcomes))
        bins.count()

    def state_dict(self) -> State:
        self._step(self._steps.take())
        return {
            f"bins.{name}.{key}": value for name, bins in self.levels.items() for key, value in bins.state().items()
        }

    def load_state_dict(self, state: State) -> None:
        parts = split_levels(state, "bins.")
        if sum(map(len, parts.values())) != len(state):
            raise PolicyError(f"this is no state of Nightjar: it holds {sorted(state)}")
        found = {name: _Bins(self.most + 1, self.decay, self.rng) for name in parts}
        for name, part in parts.items():
            found[name].load(part)
        self.levels = found
        self._steps.take()

    def info(self) -> dict[str, Any]:
        return {f"{name}.gamma": bins.gamma for name, bins in self.levels.items()}
