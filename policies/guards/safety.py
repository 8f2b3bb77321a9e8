"""A wrapper that keeps a learned policy close to the better of two plain ones: no drafting, and a fixed gamma.

In the manner of conservative bandits (Wu et al., ICML 2016) a budget of tokens is kept per compression level. Every
step adds what it produced and takes off (1 - epsilon) times what the better baseline would have made in the step's
modelled seconds. While the budget is overdrawn the baseline is played instead, which fills it up again. So at any time

    tokens >= (1 - epsilon) * best baseline rate * modelled seconds - burn_in - (the loss of one step)

in expectation over the baseline's own luck, up to the probes below, and with the rates as the cost model and the
acceptances seen so far give them. The credit of good times is capped at ``4 * burn_in``, so that it cannot pay for a
long bad time later. Where what the fixed gamma would have produced falls short of three quarters of its estimate by a
burn-in, the estimate was of another time (another draft, say): it is made anew, and the burn-in starts anew. If the
guard was just playing it, the policy returns to what it started from, too. Where the machine turns out to be
another one than the seconds were of, a debt that those seconds made is void.

What the fixed gamma would have produced from where a step began is known from every step that drafted as many or met a
rejection. Where the policy stopped earlier and all was accepted, the rest is estimated from the probes: they draft on
past the point where the policy would have stopped, and so measure acceptance just there. (A plain product-limit
estimate would flatter the fixed gamma, as a good policy stops where acceptance is low.) Then the steps that the fixed
gamma would have needed are added up over the text: a stretch of n tokens takes it n / m steps, m its tokens per step
thereabouts. (A mean of m over the policy's own steps would count easy stretches too often where those steps are short.)
As probes are few, the estimate may be off by a tenth; steps that are taken over put it right.

The guard also settles when the policy sleeps (:mod:`policies.guards.sleep`). Steps asleep are plain decoding where that
is the better baseline, and count for nothing here: neither do they fill the budget up, nor bring the next probe nearer.

While a text has much that the draft has not read, as a long prompt, and the policy does not have it read, no probe of
the fixed gamma does so either, and the comparison is with plain decoding.

Batches of a policy that decides their rows together are compared with plain ones: :mod:`policies.guards.batch_guard`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.batches import Forward
from policies.costs.cost_aware import CostAware
from policies.costs.cost_model import CostModel
from policies.costs.level_costs import LevelCosts
from policies.costs.reading import CAUGHT
from policies.estimators.bayesian_linear import check_array
from policies.guards.batch_guard import KEY as BATCH
from policies.guards.batch_guard import BatchGuard
from policies.guards.fault import Wrapper, whole
from policies.guards.joint import PassesRows
from policies.guards.ledger import CLOSE, FAR, OWN, PROBE, SHARE, Ledger
from policies.guards.sleep import NUMBERS, STRETCH
from policies.steps import Batch, Plan

log = logging.getLogger(__name__)
REVIEW_EVERY = 16
#: Level, position where it ends, whether to sleep through it, the level's ledger.
_Stretch: TypeAlias = tuple[str, int, bool, Ledger]


class Asleep:
    """What a decision that was taken asleep has for features."""

    __slots__ = ()


class SafetyGuard(PassesRows, Wrapper):
    """Modelled goodput at least (1 - epsilon) of the better of autoregressive and ``fixed:gamma``, past a burn-in.

    Gamma 0 and the fixed gamma are both re-probed for ever, at a falling rate: the j-th probe of either comes at step
    16 j^2 of a level (64 j^2 while its estimated rate is a fifth below the best, 256 j^2 from two fifths on, so that a
    dear probe is a rare one) unless the policy has played it by itself since the probe before. So no estimate that the
    comparison rests on goes stale, and a policy that has stopped drafting gets to see whether drafting pays by now.

    Parameters
    ----------
    policy : Policy
        The policy to guard; its own cost model is used where it has one.
    gamma : int
        The fixed gamma of the comparison; where no step may draft as many, the most that one may.
    epsilon : float
        Share of the baseline's goodput that may be given up.
    burn_in : float
        Tokens that may be lost before the policy is held back.
    sleeps : bool
        Whether to decode plainly without asking the policy where asking it does not pay, see
        :mod:`policies.guards.sleep`.
    """

    def __init__(
        self, policy: Policy, gamma: int = 4, epsilon: float = 0.05, burn_in: float = 50.0, sleeps: bool = True
    ) -> None:
        super().__init__(policy)
        if not 1 <= gamma <= MAX_GAMMA:
            raise PolicyError(f"the safety gamma must be from 1 to {MAX_GAMMA}, got {gamma}")
        if not 0 < epsilon < 1 or not 0 < burn_in < float("inf"):
            raise PolicyError(f"epsilon must be between 0 and 1 and burn_in above zero, got {epsilon} and {burn_in}")
        self.gamma, self.epsilon, self.burn_in, self.sleeps = gamma, epsilon, burn_in, sleeps
        own = getattr(policy, "costs", None)
        self.model = own if own is not None else CostModel()
        self._shared = own is not None
        self._ledgers: dict[str, Ledger] = {}
        # Steps that the guard has taken over and not learnt from yet: id -> where the policy would have stopped.
        self._taken: dict[int, int] = {}
        # Steps that the policy took up with another drafter, or went on with: id -> tokens drafted before that.
        self._switched: dict[int, int] = {}
        # Steps in which the fixed gamma would have had much to read first, and the policy did not.
        self._unread: set[int] = set()
        self.joint, self.in_steps = policy.joint, policy.in_steps
        self.rows = BatchGuard(policy, epsilon, burn_in, sleeps)

    def ledger(self, level: str) -> Ledger:
        """Return a level's ledger, made on first use."""
        found = self._ledgers.get(level)
        if found is None:
            found = self._ledgers[level] = Ledger(self.gamma, self.burn_in)
            self._review(found, self.model.level(level))
        return found

    def _stretch(self, context: Context) -> _Stretch:
        """Begin a stretch of the sequence, and settle whether to sleep through it."""
        level = context.level
        ledger = self.ledger(level)
        plain = self.model.level(level).seconds.item(0)
        asleep = self.sleeps and ledger.sleep.start(plain, ledger.baseline == 0)
        found = context.memory[self] = level, context.position + STRETCH, asleep, ledger
        return found

    def decide(self, context: Context) -> Decision:
        stretch = context.memory.get(self)
        if stretch is None or stretch[0] != context.level or stretch[1] <= context.position:
            stretch = self._stretch(context)
        _, _, asleep, ledger = stretch
        if asleep:
            return Decision(self.policy.new_id(), 0, policy_version=self.policy.version, features=Asleep())
        decision = self.policy.decide(context)
        if decision.drafter and decision.drafter not in context.drafters[:1]:
            self._switch(decision, 0)
        ledger.steps += 1
        limit = context.max_gamma
        if type(decision.gamma) is not int and (gamma := whole(decision.gamma)) >= 0:
            decision = replace(decision, gamma=gamma)
        if type(decision.gamma) is not int or not 0 <= decision.gamma <= MAX_GAMMA:
            return decision  # for the fault guard around this one
        if limit > ledger.most:
            ledger.allow(limit)
        which = 0 if ledger.steps >= ledger.due[0] else 1 if ledger.steps >= ledger.due[1] else -1
        unread = context.unread >= CAUGHT and self._spared(context, decision)
        if unread and which == 1:
            which = -1
        if which >= 0 and limit >= ledger.gamma:
            ledger.probes[which] += 1
            ledger.due[which] = max(ledger.spacing[which] * ledger.probes[which] ** 2, ledger.steps + 1)
            return self._take(decision, ledger.gamma if which else 0)
        if ledger.budget < 0.0:
            ledger.interventions += 1
            return self._take(decision, 0 if unread else min(ledger.baseline, limit))
        return decision

    def _spared(self, context: Context, decision: Decision) -> bool:
        """Whether the fixed gamma would have much to read in a step in which the policy has not; note it if so."""
        asks = decision.gamma and (not decision.drafter or decision.drafter == context.drafters[0])
        if asks or context.unread < self.model.level(context.level).dear:
            return False
        if len(self._unread) >= 1024:
            self._unread.clear()
        self._unread.add(decision.id)
        return True

    def plan(self, batch: Batch) -> Plan:
        """See :class:`~policies.steps.StepPolicy`."""
        found: Plan = self.rows.plan(batch)
        return found

    def learn_step(
        self, plan: Plan, slots: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], forward: Forward
    ) -> None:
        """See :class:`~policies.steps.StepPolicy`."""
        self.rows.learn_step(plan, slots, drafted, accepted, forward)

    def _take(self, decision: Decision, gamma: int) -> Decision:
        """Return a decision to play ``gamma`` instead; features stay, so that the policy learns from the step."""
        if len(self._taken) >= 1024:  # decisions whose outcomes never came
            self._taken.clear()
        own = self._switched.pop(decision.id, decision.gamma)
        self._taken[decision.id] = min(own, gamma)
        # The rule is deterministic, so gamma was certain. A policy that stops by itself is asked on, for its opinion.
        return replace(decision, gamma=gamma, propensity=1.0, drafter="")

    def _switch(self, decision: Decision, drafted: int) -> None:
        """Note that the policy goes on with another drafter than the fixed gamma would."""
        if len(self._switched) >= 1024:
            self._switched.clear()
        self._switched[decision.id] = drafted

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        taken = self._taken.get(decision.id)
        if taken is None:
            answer = self.policy.proceed(decision, draft)
            if type(answer) is str:
                self._switch(decision, draft.drafted)
            return answer
        if draft.drafted < taken:
            answer = self.policy.proceed(decision, draft)
            if not answer or type(answer) is str:
                self._taken[decision.id] = self.policy.submit(decision, draft)
        return True

    def submit(self, decision: Decision, draft: Draft) -> int:
        taken = self._taken.get(decision.id)
        if taken is None:
            return self.policy.submit(decision, draft)
        if taken >= draft.drafted:  # it would have gone on to the end
            self._taken[decision.id] = self.policy.submit(decision, draft)
        return draft.drafted

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if type(decision.features) is Asleep:
            return
        seen = self.policy.has_learnt(decision.id)
        self.policy.learn(decision, outcome)
        if seen:
            return
        if not self._shared:
            self.model.observe(outcome)
        level, forwards = outcome.level, outcome.forwards
        ledger, costs = self._ledgers.get(level) or self.ledger(level), self.model.level(level)
        stop, sleep = self._taken.pop(decision.id, -1) if self._taken else -1, ledger.sleep
        seconds = costs.spent(outcome.drafted, forwards)
        reading = costs.catch_up * outcome.caught_up if forwards else 0.0
        if outcome.drafted == 0:
            self._postpone(ledger, 0)
        # What another drafter than the fixed gamma's proposed tells nothing of that one's.
        switched = self._switched.pop(decision.id, -1) if self._switched else -1
        own = outcome if switched < 0 else _before(outcome, switched)
        ledger.count(own, stop)
        k = own.drafted
        short = own.exhausted and k < ledger.gamma  # the fixed gamma would have drafted no more
        if short or k >= ledger.gamma:
            self._postpone(ledger, 1)
        if short or ledger.offered < 1.0:
            ledger.offered += SHARE * ((k / ledger.gamma if short else 1.0) - ledger.offered)
        if k:
            ledger.forwards += SHARE * ((forwards / k if forwards < k else 1.0) - ledger.forwards)
        if outcome.policy_seconds:
            sleep.spent(outcome.policy_seconds)
        sleep.tokens += outcome.produced
        sleep.seconds += seconds + reading
        if ledger.baseline == 0:  # the fixed gamma would have had to read as much
            seconds += reading
        rate = ledger.rate
        # Where reading would not have paid, the better baseline is plain decoding.
        if self._unread and decision.id in self._unread:
            self._unread.remove(decision.id)
            rate = (1.0 - self.epsilon) / costs.spent(0, 0)
        budget, most = ledger.budget + outcome.produced - rate * seconds, self.burn_in
        # A debt beyond the burn-in can only come of wrong estimates: it is not held against the policy for ever.
        ledger.budget = -most if budget < -most else budget if budget < 4.0 * most else 4.0 * most
        if ledger.disproved(self.burn_in):
            ledger.budget = self.burn_in
            if stop >= 0 and k == ledger.gamma and isinstance(self.policy, CostAware):
                self.policy.forget()
            self._review(ledger, costs)
        if ledger.steps % REVIEW_EVERY == 0 or ledger.steps < REVIEW_EVERY:
            self._review(ledger, costs)
            if ledger.steps >= REVIEW_EVERY:
                ledger.fade()

    @staticmethod
    def _postpone(ledger: Ledger, which: int) -> None:
        """The policy played by itself what a probe is for: count it as the next probe if that is due."""
        if ledger.steps >= ledger.spacing[which] * ledger.probes[which] ** 2:
            ledger.probes[which] += 1
            ledger.due[which] = ledger.spacing[which] * ledger.probes[which] ** 2

    def _review(self, ledger: Ledger, costs: LevelCosts) -> None:
        """Find the better baseline anew."""
        plain = 1.0 / float(costs.seconds[0])
        ledger.told(plain)
        free = (1.0 - ledger.forwards) * ledger.gamma * costs.draft
        more = float(costs.seconds[ledger.gamma]) - free - 1.0 / plain
        fixed = ledger.tokens / ledger.fixed_steps / (1.0 / plain + ledger.offered * more)
        ledger.baseline = ledger.gamma if fixed > plain else 0
        ledger.rate = (1.0 - self.epsilon) * max(plain, fixed)
        best = max(plain, fixed, costs.rate)
        behind = [min(max((1.0 - rate / best) / CLOSE, 1.0), FAR) for rate in (plain, fixed)]
        ledger.spacing = [int(PROBE * times * times) for times in behind]

    def state_dict(self) -> State:
        found: State = self.policy.state_dict()
        for level, x in self._ledgers.items():
            found[f"safety.{level}"] = np.array(x.row())
            found[f"safety_sleep.{level}"] = np.array(x.sleep.row())
        if not self._shared:
            found |= self.model.state()
        found |= self.rows.state()
        return found

    def load_state_dict(self, state: State) -> None:
        if any(key.startswith("safety_nap.") for key in state):
            log.warning("a state of version 0.1: its sleep schedules are read under their former name")
            state = {key.replace("safety_nap.", "safety_sleep."): value for key, value in state.items()}
        own = {k for k in state if k.startswith(("safety.", "safety_sleep.", BATCH))}
        if not self._shared:
            own |= {k for k in state if k.startswith("cost.")}
            self.model.load(state)
        self.policy.load_state_dict({k: v for k, v in state.items() if k not in own})
        self.rows.load(state)
        # A level without a ledger in the state (merged statistics have none) keeps the one it has.
        for key in (k for k in own if k.startswith("safety.")):
            row = np.asarray(state[key], dtype=float)
            if row.shape not in ((OWN + 2 * self.gamma,), (OWN + 2 * self.gamma + 1,)) or not np.isfinite(row).all():
                raise PolicyError(
                    f"the state's '{key}' is not a ledger of safety gamma {self.gamma}: use the one it had"
                )
            level = key.removeprefix("safety.")
            ledger = self.ledger(level)
            ledger.fill(row.tolist())
            if (key := f"safety_sleep.{level}") in state:
                row = check_array(state, key, (NUMBERS,)).astype(float)
                try:
                    ledger.sleep.fill(row.tolist())
                except ValueError as error:
                    raise PolicyError(f"the state's '{key}' is no account of a sleep schedule: {error}") from None
            self._review(ledger, self.model.level(level))

    def start_run(self) -> None:
        """Begin a run with a state of an earlier one: its debts are kept, its credit is not this run's to spend."""
        for ledger in self._ledgers.values():
            ledger.budget = min(ledger.budget, self.burn_in)

    def info(self) -> dict[str, Any]:
        held = {f"{level}.held_back": ledger.interventions for level, ledger in self._ledgers.items()}
        slept = {f"{level}.slept": ledger.sleep.slept for level, ledger in self._ledgers.items() if ledger.sleep.slept}
        found: dict[str, Any] = self.policy.info() | held | slept | self.rows.info()
        return found


def _before(outcome: Outcome, drafted: int) -> Outcome:
    """Return what an outcome tells the ledger of its first ``drafted`` tokens."""
    k, n, labelled = outcome.drafted, outcome.accepted, outcome.labelled
    k, n, labelled = (
        k if k < drafted else drafted,
        n if n < drafted else drafted,
        labelled if labelled < drafted else drafted,
    )
    return Outcome(k, n, labelled, outcome.produced, signals=outcome.signals)
