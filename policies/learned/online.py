"""`online`: predicts the acceptance of every token, and drafts on while the next tokens are worth their seconds.

It starts from MLP16, which is read within the step, where its own inputs exist: its hidden layer stands beside the
token's own signals, lookups and history (:mod:`policies.acceptance.model`). Acceptance and seconds are learnt.

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

Where the draft model has much to read first, as a long prompt, it is not asked, and lookups alone are drafted, until
reading pays (:mod:`policies.costs.reading`).

Where a budget ends within a step's reach, tokens beyond it are worth nothing, and the last one is worth a plain step:
left over, it would take one of its own.

The rows of a batch are decided together: :mod:`policies.learned.batch_rule`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import numpy as np

from policies.acceptance.model import WAITING, AcceptanceModel
from policies.acceptance.step import Step
from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Draft, Outcome, PolicyError, State
from policies.costs.reading import Reading, Readings
from policies.estimators.bayesian_linear import check_array
from policies.learned.online_rows import OnlineRows

STATE_FORMAT = 4
#: Tokens that are less likely than that to be accepted need not be looked at.
SLIGHT = 1e-3
#: What the next token may take: a forward, the step's first forward, nothing (a lookup proposes it).
FORWARD, FIRST, FREE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Rule:
    """What a level's decisions need, in tokens at the rate of the latest steps.

    Attributes
    ----------
    version : int
        That of the costs it was made from.
    wider : list of float
        By k, what verifying k tokens takes on top of verifying none.
    plain : list of float
        By k, what a step that submits k tokens takes besides drafting them.
    draft, first : float
        What a forward of the draft takes, and a step's first one on top.
    last : float
        What the last token of a budget is worth: without it, it would take a step of its own.
    reading : Reading
        What the draft model brings to texts that it has read.
    dear : float
        From how many unread tokens on their reading is weighed.
    """

    version: int
    wider: list[float]
    plain: list[float]
    draft: float
    first: float
    last: float
    reading: Reading
    dear: float

    def local(self, tokens: float, submitted: int, forwards: int) -> float:
        """Return how many times the latest steps' rate is in force in a step with so many tokens in prospect."""
        price = self.plain[submitted]
        if forwards:
            price += self.draft * forwards + self.first
        return sqrt(tokens / price)

    def best(self, drafted: int, survival: list[float], left: int, forwards: int, tail: int) -> int:
        """Return how many of so many drafted tokens to submit.

        Those from ``tail`` on are lookups, of which as many were drafted as there are: the rate that the step has in
        prospect is that with the best number of them.
        """
        plain, wider = self.plain, self.wider
        spent = self.draft * forwards + self.first if forwards else 0.0
        tokens, rate = 1.0, 0.0
        for k in range(1, drafted + 1):
            tokens += survival[k]
            if k >= tail:
                found = tokens / (plain[k] + spent)
                if found > rate:
                    rate = found
        rate = sqrt(rate)
        best = worth = 0.0
        count = 0
        for k in range(1, drafted + 1):
            worth += survival[k] * self.last if k == left else survival[k]
            gain = worth - rate * wider[k]
            if gain > best:
                best, count = gain, k
        return count

    def pays(self, k: int, kind: int, left: int, p: float, survival: float) -> bool:
        """Whether it pays to draft on after k tokens where ``left`` accepted ones end the text: whether any m does."""
        wider, each, last = self.wider, 0.0 if kind == FREE else self.draft, left if left < MAX_GAMMA else MAX_GAMMA
        price, chance, gain = (self.first if kind == FIRST else 0.0) - wider[k], survival, 0.0
        for j in range(k + 1, last + 1):
            price += each
            chance *= p
            gain += chance * self.last if j == left else chance
            if gain >= price + wider[j]:
                return True
            if chance < SLIGHT:
                break
        return False

    def worth(self, k: int, kind: int, left: int, p: float, survival: float) -> float:
        """Return what drafting on after k tokens is worth at best, and at least 0, in tokens as dear as survival."""
        wider, each, last = self.wider, 0.0 if kind == FREE else self.draft, left if left < MAX_GAMMA else MAX_GAMMA
        price, chance, gain, best = (self.first if kind == FIRST else 0.0) - wider[k], survival, 0.0, 0.0
        for j in range(k + 1, last + 1):
            price += each
            chance *= p
            gain += chance * self.last if j == left else chance
            found = gain - price - wider[j]
            if found > best:
                best = found
            elif chance < SLIGHT:
                break
        return best


class Online(OnlineRows):
    """Token-level stopping by predicted acceptance and measured seconds.

    Parameters
    ----------
    weights : str or Weights
        MLP16, whose hidden layer is read in the step: an npz; the shipped weights by default.
    acceptance : str
        An npz of acceptance weights, see :class:`~policies.acceptance.model.AcceptanceModel`; the shipped ones by
        default, ``none`` for a cold start.
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
    learn : {'all', 'costs', 'none'}
        What is learnt while decoding: ``costs`` leaves acceptance as it was pretrained, and ``none`` leaves everything
        as it is in the state that was loaded. What a text remembers of its own drafts is no learning: it is always on.
    objective, cost_half_life, adwin, seed, worker
        As in :class:`~policies.costs.cost_aware.CostAware`.
    """

    summary = "stops token by token where predicted acceptance no longer pays for the measured seconds; learns both"
    learns = True
    guarded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weights: str = "",
        acceptance: str = "",
        strength: float = 1500.0,
        discount: float = 0.9995,
        refresh: int = 128,
        cap: int = MAX_GAMMA,
        lookups: bool = True,
        learn: Literal["all", "costs", "none"] = "all",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if learn not in ("all", "costs", "none"):
            raise PolicyError(f"learn must be all, costs or none, got '{learn}'")
        self.learning = learn
        if not 1 <= refresh < WAITING or not 0 <= cap <= MAX_GAMMA:
            wanted = f"refresh must be from 1 to {WAITING - 1} and cap from 0 to {MAX_GAMMA}"
            raise PolicyError(f"{wanted}, got {refresh} and {cap}")
        self.every, self.cap, self.lookups = refresh, cap, lookups
        self.acceptance_model = AcceptanceModel(acceptance, strength, discount, weights)
        self._rules: dict[str, Rule] = {}
        self.readings = Readings()
        self.start_batches()

    def _rule(self, level: str) -> Rule:
        """Return the level's rule under its latest costs."""
        costs = self.costs.level(level)
        found = self._rules.get(level)
        if found is None or found.version != costs.version:
            rate, verify = costs.rate, costs.verify
            wider, plain = (rate * (verify - verify[0])).tolist(), (rate * (verify + costs.overhead)).tolist()
            reading = self.readings.level(level)
            draft, first = rate * costs.draft, rate * costs.first
            found = Rule(costs.version, wider, plain, draft, first, costs.price.item(0), reading, costs.dear)
            self._rules[level] = found
        return found

    def _pays(self, k: int, step: Step, lookup_alternative: float) -> bool | str:
        """Whether to draft on after k tokens of a step; by name, if as another drafter.

        ``lookup_alternative`` is how sure the drafter is of the lookup that the next token could be instead.
        """
        if not self.timed:
            return True
        rule: Rule = step.rule
        forwards, left, survival = step.forwards, step.left, step.survival[k]
        sure = step.confidence
        if sure:
            here = rule.local(step.expected + survival * sure, k + 1, forwards)
            return rule.pays(k, FREE, left, sure, survival / here)
        if step.unread:
            here = rule.local(step.expected + survival * lookup_alternative, k + 1, forwards)
            looks = self.lookups and lookup_alternative
            return LOOKUP if looks and rule.pays(k, FREE, left, lookup_alternative, survival / here) else False
        p, kind = step.chance(), FORWARD if forwards else FIRST
        # `local`, written out: this is asked for every token.
        here = sqrt((step.expected + survival * p) / (rule.plain[k + 1] + rule.draft * (forwards + 1) + rule.first))
        if not lookup_alternative or not self.lookups:
            return rule.pays(k, kind, left, p, survival / here)
        told = 1.0 + 4.0 * p * (1.0 - p)  # what the tokens' own signals may add
        asked = told * here * rule.worth(k, kind, left, p, survival / here)
        here = rule.local(step.expected + survival * lookup_alternative, k + 1, forwards)
        return LOOKUP if here * rule.worth(k, FREE, left, lookup_alternative, survival / here) > asked else asked > 0.0

    def decide(self, context: Context) -> Decision:
        step = Step(context, self.acceptance_model)
        rule = step.rule = self._rule(context.level)
        if context.unread >= rule.dear and self.timed:
            costs = self.costs.level(context.level)
            steps = costs.catch_up * context.unread / costs.spent(0, 0)
            step.unread = not rule.reading.pays(steps, context.remaining)
        gamma = self.cap if self.cap < context.max_gamma else context.max_gamma
        pays = self._pays(0, step, context.lookup_alternative) if gamma else False
        if not pays:
            return Decision(self.new_id(), 0, False, 1.0, self.version, step)
        if pays is True:
            return Decision(self.new_id(), gamma, True, 1.0, self.version, step)
        # Lookups are drafted to the end, and what is not worth its verification is dropped then.
        return Decision(self.new_id(), gamma, False, 1.0, self.version, step, LOOKUP, True)

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        step: Step = decision.features
        step.extend(draft.drafted, draft)
        return self._pays(draft.drafted, step, draft.lookup_alternative)

    def submit(self, decision: Decision, draft: Draft) -> int:
        step: Step = decision.features
        drafted = draft.drafted
        step.extend(drafted, draft)
        if not self.timed:
            return drafted
        rule: Rule = step.rule
        tail = step.asked[-1][0] + 1 if step.asked else 0
        return rule.best(drafted, step.survival, step.left, step.forwards, tail)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        step: Step | None = decision.features
        if self.learning != "none":
            self.costs.observe(outcome)
            if step is not None:
                rule: Rule = step.rule
                taken = rule.plain[outcome.drafted]
                if outcome.forwards:
                    taken += rule.draft * outcome.forwards + rule.first
                rule.reading.add(step.unread, outcome.produced, taken / rule.plain[0])
        if step is not None and outcome.labelled:
            self.teach_step(step, outcome)
            if self.drift is not None and self.learning != "none" and self.drift.add(outcome):
                self.forget()

    def teach(self, decision: Decision, outcome: Outcome) -> None:
        self.teach_step(decision.features, outcome)

    def teach_step(self, step: Step, outcome: Outcome) -> None:
        # Where the guard drafted on, or a sampler did without asking, some tokens were not described yet.
        if outcome.forwards > step.forwards:
            step.extend(outcome.labelled, outcome)
        if self.learning != "all":
            self.acceptance_model.remember(step, outcome.labelled, outcome.accepted)
            return
        self.acceptance_model.add(step, outcome.labelled, outcome.accepted)
        # Early steps move the weights most, and rows are linearised at the weights in use: start with short waits, at
        # every level.
        pending = self.acceptance_model.pending
        if pending >= self.every or pending >= 1 + self.acceptance_model.known(step.level) // 2:
            self.acceptance_model.refresh()
            self.version += 1

    def forget(self) -> None:
        self.acceptance_model.forget()
        self.version += 1

    def state_dict(self) -> State:
        own = self.acceptance_model.state() | self.batch_costs.state() | self.readings.state()
        return {"online.format": np.array(STATE_FORMAT)} | own | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "online.format", ())) != STATE_FORMAT:
            raise PolicyError(f"not a state of format {STATE_FORMAT} of policy online: another version saved it")
        self.acceptance_model.load(state)
        self.batch_costs.load(state)
        self.readings.load(state)
        self._prices.clear()
        super().load_state_dict(state)
        self._rules.clear()
        self.version += 1

    def take_delta(self) -> State:
        own = self.acceptance_model.take_delta() | self.batch_costs.take_delta() | self.readings.take_delta()
        return own | super().take_delta()

    def merge(self, delta: State) -> None:
        self.acceptance_model.merge(delta)
        self.batch_costs.merge(delta)
        self.readings.merge(delta)
        super().merge(delta)
        self.version += 1
