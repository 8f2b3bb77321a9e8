"""`goodput`: predicts the acceptance of every token, and drafts on while the next tokens are worth their seconds.

With k tokens drafted whose joint survival estimate is S_k, and p the acceptance predicted for the next token, drafting
m more is worth S_k (p + p^2 + ... + p^m) tokens and costs lambda (m t_d + T_v(k+m+1) - T_v(k+1)). The policy goes on if
that pays for any m. For m = 1 alone this is the one-step-ahead rule, optimal while survival falls and costs do not; the
look ahead sees past a verify that is dear for two tokens and no dearer for eight. Gamma 0 is the same rule at k = 0.
Drafting paid for, the tail is submitted only where its survival pays for the wider verify.

lambda is what a token is worth: the tokens that can be had for a second elsewhere. A text is of some length, so that a
token drafted here saves the seconds of one a little further on. Stretches in which drafts are right go on for a while,
and tokens are cheap there; after a rejection they are dear. So lambda is the geometric mean of two rates: that of the
latest steps, and that which this step itself has in prospect with its next token.

Where the drafter has a lookup to offer in place of a forward, the policy turns to it, and to lookups alone until the
step ends, if that is worth more. What going on with the model is worth counts 1 + 4 p (1 - p) times: a plan of m tokens
underrates it, the more so the less certain p is, as the tokens' own signals will tell when to stop.

Where a budget ends within a step's reach, tokens beyond it are worth nothing, and the last one is worth a plain step:
left over, it would take one of its own.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar, NamedTuple

import numpy as np

from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Outcome, PolicyError, State
from policies.gaussian import check_array
from policies.hazard import WAITING, Hazard
from policies.learned import CostAware
from policies.level_cost import LevelCosts
from policies.step_features import Step

STATE_FORMAT = 3
BINS = 32
_M = np.arange(1, MAX_GAMMA + 1)
#: [m - 1, b] is 1 / (p + p^2 + ... + p^m) at the middle of bin b.
_PER_GAIN = 1.0 / np.cumsum(((np.arange(BINS) + 0.5) / BINS) ** _M[:, None], axis=0)
#: What the next token may take: a forward, the step's first forward, nothing (a lookup proposes it).
FORWARD, FIRST, FREE = 0, 1, 2


class Rule(NamedTuple):
    """What a level's decisions need, in tokens at the rate of the latest steps.

    Attributes
    ----------
    version : int
        That of the costs it was made from.
    least : dict of int to list of float
        By ``3 k + kind`` of the next token, the least survival that pays for it, by bin of its chance.
    wider : list of float
        By k, what verifying k tokens takes on top of verifying none.
    plain : list of float
        By k, what a step that submits k tokens takes besides drafting them.
    draft, first : float
        What a forward of the draft takes, and a step's first one on top.
    last : float
        What the last token of a budget is worth: without it, it would take a step of its own.
    """

    version: int
    least: dict[int, list[float]]
    wider: list[float]
    plain: list[float]
    draft: float
    first: float
    last: float

    def local(self, tokens: float, submitted: int, forwards: int) -> float:
        """Return how many times the latest steps' rate is in force in a step with so many tokens in prospect."""
        price = self.plain[submitted]
        if forwards:
            price += self.draft * forwards + self.first
        return sqrt(tokens / price)

    def ends(self, k: int, kind: int, left: int, p: float, survival: float) -> bool:
        """Whether it pays to draft on after k tokens where ``left`` accepted ones end the text: whether any m does."""
        wider, last, each = self.wider, self.last, 0.0 if kind == FREE else self.draft
        price, chance, gain = (self.first if kind == FIRST else 0.0) - wider[k], survival, 0.0
        for j in range(k + 1, left + 1):
            price += each
            chance *= p
            gain += chance * last if j == left else chance
            if gain >= price + wider[j]:
                return True
        return False

    def worth(self, k: int, kind: int, left: int, p: float, survival: float) -> float:
        """Return what drafting on after k tokens is worth at best, and at least 0, in tokens as dear as survival."""
        wider, each, last = self.wider, 0.0 if kind == FREE else self.draft, left if left < MAX_GAMMA else MAX_GAMMA
        price, chance, gain, best = (self.first if kind == FIRST else 0.0) - wider[k], survival, 0.0, 0.0
        for j in range(k + 1, last + 1):
            price += each
            chance *= p
            gain += chance * self.last if j == left else chance
            best = max(best, gain - price - wider[j])
        return best


class Goodput(CostAware):
    """Token-level stopping by predicted acceptance and measured seconds.

    Parameters
    ----------
    acceptance : str
        An npz of acceptance weights, see :class:`~policies.hazard.Hazard`; the shipped ones by default,
        ``none`` for a cold start.
    strength : float
        How many tested tokens the prior is worth at most.
    discount : float
        Forgetting per step, 0 < rho <= 1.
    refresh : int
        Steps between updates of the weights that decisions use.
    cap : int
        Most tokens to draft.
    lookups : bool
        Whether to go on with lookups where they are worth more than the model's tokens.
    objective, cost_half_life, adwin, seed, worker
        As in :class:`~policies.learned.CostAware`.
    """

    summary = "stops token by token where predicted acceptance no longer pays for the measured seconds; learns both"
    learns = True
    guarded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        acceptance: str = "",
        strength: float = 1500.0,
        discount: float = 0.9995,
        refresh: int = 128,
        cap: int = MAX_GAMMA,
        lookups: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 1 <= refresh < WAITING or not 0 <= cap <= MAX_GAMMA:
            wanted = f"refresh must be from 1 to {WAITING - 1} and cap from 0 to {MAX_GAMMA}"
            raise PolicyError(f"{wanted}, got {refresh} and {cap}")
        self.every, self.cap, self.lookups = refresh, cap, lookups
        self.hazard = Hazard(acceptance, strength, discount)
        self._rules: dict[str, Rule] = {}

    def _rule(self, level: str) -> Rule:
        """Return the level's rule under its latest costs."""
        costs = self.costs.level(level)
        found = self._rules.get(level)
        if found is None or found.version != costs.version:
            rate, verify = costs.rate, costs.verify
            wider, plain = (rate * (verify - verify[0])).tolist(), (rate * (verify + costs.overhead)).tolist()
            found = Rule(costs.version, {}, wider, plain, rate * costs.draft, rate * costs.first, costs.price.item(0))
            self._rules[level] = found
        return found

    def _pays(self, k: int, step: Step) -> bool | str:
        """Whether to draft on after k tokens of a step; by name, if as another drafter."""
        if not self.timed:
            return True
        rule, forwards = step.rule, step.forwards
        p = step.sure()
        kind = FREE if p else FORWARD if forwards else FIRST
        row = rule.least.get(3 * k + kind)
        if row is None:
            row = rule.least[3 * k + kind] = thresholds(self.costs.level(step.level), k, kind).tolist()
        if not p:
            p = step.chance()
            forwards += 1
        survival = step.survival[k]
        here = rule.local(step.expected + survival * p, k + 1, forwards)
        if step.left <= MAX_GAMMA:
            pays = rule.ends(k, kind, step.left, p, survival / here)
        else:
            pays = survival >= here * row[int(p * BINS) if p < 1.0 else BINS - 1]
        if kind != FREE and self.lookups and (offer := step.offer()):
            told = 1.0 + 4.0 * p * (1.0 - p)  # what the tokens' own signals may add
            least = told * here * rule.worth(k, kind, step.left, p, survival / here) if pays else 0.0
            here = rule.local(step.expected + survival * offer, k + 1, step.forwards)
            if here * rule.worth(k, FREE, step.left, offer, survival / here) > least:
                return LOOKUP
        return pays

    def decide(self, context: Context) -> Decision:
        step = Step(context, self.hazard)
        step.rule = self._rule(context.level)
        gamma = self.cap if self.cap < context.max_gamma else context.max_gamma
        pays = self._pays(0, step) if gamma else False
        if not pays:
            return Decision(self.new_id(), 0, False, 1.0, self.version, step)
        return Decision(self.new_id(), gamma, True, 1.0, self.version, step, "" if pays is True else LOOKUP)

    def proceed(self, decision: Decision, drafted: int, signals: np.ndarray) -> bool | str:
        step: Step = decision.features
        step.extend(drafted, signals)
        return self._pays(drafted, step)

    def submit(self, decision: Decision, drafted: int, signals: np.ndarray) -> int:
        step: Step = decision.features
        step.extend(drafted, signals)
        if not self.timed:
            return drafted
        rule = step.rule
        here = rule.local(step.expected, drafted, step.forwards)
        best = worth = 0.0
        count = 0
        for k in range(1, drafted + 1):
            worth += step.survival[k] * (rule.last if k == step.left else 1.0)
            gain = worth - here * rule.wider[k]
            if gain > best:
                best, count = gain, k
        return count

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        step: Step = decision.features
        # Where the guard drafted on, or a sampler did without asking, some tokens were not described yet.
        step.extend(outcome.tested, outcome.signals)
        self.hazard.add(step, outcome.tested, outcome.accepted)
        # Early steps move the weights most, and rows are linearised at the weights in use: start with short waits, at
        # every level.
        if self.hazard.pending >= min(self.every, 1 + self.hazard.known(step.level) // 2):
            self.hazard.refresh()
            self.version += 1

    def forget(self) -> None:
        self.hazard.forget()
        self.version += 1

    def state_dict(self) -> State:
        return {"goodput.format": np.array(STATE_FORMAT)} | self.hazard.state() | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "goodput.format", ())) != STATE_FORMAT:
            raise PolicyError(f"the state is not of format {STATE_FORMAT} of goodput: it was saved by another version")
        self.hazard.load(state)
        super().load_state_dict(state)
        self._rules.clear()
        self.version += 1

    def take_delta(self) -> State:
        return self.hazard.take_delta() | super().take_delta()

    def merge(self, delta: State) -> None:
        self.hazard.merge(delta)
        super().merge(delta)
        self.version += 1


def thresholds(costs: LevelCosts, k: int, kind: int = FORWARD) -> np.ndarray:
    """Least survival that pays for drafting on after k tokens, shape (BINS,): min over m of lambda * cost / gain.

    What the next token takes, ``kind``, is taken for all of those after it.
    """
    verify, m = costs.verify, _M[: MAX_GAMMA - k]
    price = 0.0 if kind == FREE else costs.draft
    cost = m * price + verify[k + 1 :]
    cost += (costs.first if kind == FIRST else 0.0) - verify.item(k)
    cost *= costs.rate
    found: np.ndarray = np.minimum.reduce(cost[:, None] * _PER_GAIN[: len(m)])
    return found
