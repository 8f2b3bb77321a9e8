"""A wrapper that keeps a learned policy close to the better of two plain ones: no drafting, and a fixed gamma.

In the manner of conservative bandits (Wu et al., ICML 2016) a budget of tokens is kept per compression level. Every
step adds what it produced and takes off (1 - epsilon) times what the better baseline would have produced in the step's
modelled seconds. Where the policy's choice, if it came to the worst (one token), would overdraw the budget, the baseline
is played instead, which fills the budget up again. So at any time

    tokens >= (1 - epsilon) * best baseline rate * modelled seconds - burn_in,

in expectation over the baseline's own luck, up to the probes below, and with the rates as the cost model and the
acceptances seen so far give them. The credit of good times is capped at ``4 * burn_in``, so that it cannot pay for a
long bad time later.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.cost import CostModel, LevelCosts
from policies.guard import Wrapper

REVIEW_EVERY = 16
#: Weight that the acceptance counts of a review keep until the next one.
KEEP = 0.98
#: The j-th probe comes at step PROBE * j^2.
PROBE = 8


class _Ledger:
    """One level's budget, acceptance counts by position, and probing schedule."""

    def __init__(self) -> None:
        self.steps = 0
        self.budget = 0.0
        self.tested = [0.0] * MAX_GAMMA
        self.passed = [0.0] * MAX_GAMMA
        self.baseline = 0
        self.rate = 0.0  # (1 - epsilon) * the baseline's tokens per second
        self.interventions = 0
        # Probes of gamma 0 and of the fixed gamma: how many there were, and the step of the next one.
        self.probes = [0, 0]
        self.due = [0, 0]


class SafetyGuard(Wrapper):
    """Modelled goodput at least (1 - epsilon) of the better of autoregressive and ``fixed:gamma``, past a burn-in.

    Gamma 0 and the fixed gamma are both re-probed for ever, at a falling rate: the j-th probe of either comes at step
    8 j^2 of a level unless the policy has played it by itself since the probe before. So no estimate that the
    comparison rests on goes stale, and a policy that has stopped drafting gets to see whether drafting pays by now.

    Parameters
    ----------
    policy : Policy
        The policy to guard; its own cost model is used where it has one.
    gamma : int
        The fixed gamma of the comparison.
    epsilon : float
        Share of the baseline's goodput that may be given up.
    burn_in : float
        Tokens that may be lost before the policy is held back.
    """

    def __init__(self, policy: Policy, gamma: int = 4, epsilon: float = 0.05, burn_in: float = 50.0) -> None:
        super().__init__(policy)
        if not 1 <= gamma <= MAX_GAMMA:
            raise PolicyError(f"the safety gamma must be from 1 to {MAX_GAMMA}, got {gamma}")
        if not 0 < epsilon < 1 or not 0 < burn_in < float("inf"):
            raise PolicyError(f"epsilon must be between 0 and 1 and burn_in above zero, got {epsilon} and {burn_in}")
        self.gamma, self.epsilon, self.burn_in = gamma, epsilon, burn_in
        own = getattr(policy, "costs", None)
        self.model = own if own is not None else CostModel()
        self._shared = own is not None
        self._ledgers: dict[str, _Ledger] = {}

    def ledger(self, level: str) -> _Ledger:
        """Return a level's ledger, made on first use."""
        found = self._ledgers.get(level)
        if found is None:
            found = self._ledgers[level] = _Ledger()
            found.budget = self.burn_in
            self._review(found, self.model.level(level))
        return found

    def decide(self, context: Context) -> Decision:
        decision = self.policy.decide(context)
        ledger = self.ledger(context.level)
        ledger.steps += 1
        gamma, limit = decision.gamma, context.max_gamma
        if type(gamma) is not int or not 0 <= gamma <= MAX_GAMMA:
            return decision  # for the fault guard around this one
        which = 0 if ledger.steps >= ledger.due[0] else 1 if ledger.steps >= ledger.due[1] else -1
        if which >= 0 and limit >= self.gamma:
            ledger.probes[which] += 1
            ledger.due[which] = max(PROBE * ledger.probes[which] ** 2, ledger.steps + 1)
            return self._override(decision, self.gamma if which else 0)
        seconds = self.model.level(context.level).seconds
        worst = 1.0 - ledger.rate * seconds.item(gamma)
        if ledger.budget + min(worst, 0.0) < 0.0 and gamma != ledger.baseline:
            ledger.interventions += 1
            return self._override(decision, min(ledger.baseline, limit))
        return decision

    def _override(self, decision: Decision, gamma: int) -> Decision:
        if decision.gamma != gamma or decision.stops:
            # The rule is deterministic, so gamma was certain; features stay, and the policy learns from the step.
            decision.gamma, decision.stops, decision.propensity = gamma, False, 1.0
        return decision

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        seen = decision.id in self.policy._learnt
        self.policy.learn(decision, outcome)
        if seen:
            return
        if not self._shared:
            self.model.observe(outcome)
        ledger, k, n = self.ledger(outcome.level), outcome.drafted, outcome.accepted
        tested, passed = ledger.tested, ledger.passed
        for j in range(n):
            tested[j] += 1.0
            passed[j] += 1.0
        if outcome.tested > n:
            tested[n] += 1.0
        if k == 0:
            self._postpone(ledger, 0)
        elif k >= self.gamma:
            self._postpone(ledger, 1)
        costs = self.model.level(outcome.level)
        ledger.budget += outcome.produced - ledger.rate * costs.seconds.item(k)
        if ledger.budget > 4.0 * self.burn_in:
            ledger.budget = 4.0 * self.burn_in
        if ledger.steps % REVIEW_EVERY == 0 or ledger.steps < REVIEW_EVERY:
            self._review(ledger, costs)

    @staticmethod
    def _postpone(ledger: _Ledger, which: int) -> None:
        """The policy played by itself what a probe is for: count it as the next probe if that is near."""
        if ledger.steps >= PROBE * ledger.probes[which] ** 2:
            ledger.probes[which] += 1
            ledger.due[which] = PROBE * ledger.probes[which] ** 2

    def _review(self, ledger: _Ledger, costs: LevelCosts) -> None:
        """Find the better baseline anew: tokens of the fixed gamma by the product-limit (Kaplan-Meier) estimate."""
        alive, tokens = 1.0, 1.0
        for j in range(self.gamma):
            # Two pseudo-tests at 0.5: nothing is promised before there is data.
            alive *= (ledger.passed[j] + 1.0) / (ledger.tested[j] + 2.0)
            tokens += alive
        plain, fixed = 1.0 / float(costs.seconds[0]), tokens / float(costs.seconds[self.gamma])
        ledger.baseline = self.gamma if fixed > plain else 0
        ledger.rate = (1.0 - self.epsilon) * max(plain, fixed)
        if ledger.steps >= REVIEW_EVERY:
            ledger.tested = [KEEP * x for x in ledger.tested]
            ledger.passed = [KEEP * x for x in ledger.passed]

    def state_dict(self) -> State:
        found = self.policy.state_dict()
        for level, x in self._ledgers.items():
            numbers = [x.steps, x.budget, x.interventions, *x.probes, *x.due, *x.tested, *x.passed]
            found[f"safety.{level}"] = np.array(numbers, dtype=float)
        if not self._shared:
            found |= self.model.state()
        return found

    def load_state_dict(self, state: State) -> None:
        own = {k for k in state if k.startswith("safety.")}
        if not self._shared:
            own |= {k for k in state if k.startswith("cost.")}
            self.model.load(state)
        self.policy.load_state_dict({k: v for k, v in state.items() if k not in own})
        self._ledgers.clear()
        for key in (k for k in own if k.startswith("safety.")):
            row = np.asarray(state[key], dtype=float)
            if row.shape != (7 + 2 * MAX_GAMMA,) or not np.isfinite(row).all():
                raise PolicyError(f"the state's '{key}' is not a safety ledger: load it into the version that saved it")
            level = key.removeprefix("safety.")
            ledger, x = self.ledger(level), row.tolist()
            ledger.steps, ledger.budget, ledger.interventions = int(x[0]), x[1], int(x[2])
            ledger.probes, ledger.due = [int(v) for v in x[3:5]], [int(v) for v in x[5:7]]
            ledger.tested, ledger.passed = x[7 : 7 + MAX_GAMMA], x[7 + MAX_GAMMA :]
            self._review(ledger, self.model.level(level))

    def info(self) -> dict[str, Any]:
        held = {f"{level}.held_back": ledger.interventions for level, ledger in self._ledgers.items()}
        return self.policy.info() | held
