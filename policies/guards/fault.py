"""A wrapper that no policy can break decoding through: whatever it does wrong costs speed only."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from time import perf_counter
from typing import Any

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.batches import Forward
from policies.costs.prior import CostPrior
from policies.guards.joint import FaultRows
from policies.guards.steps import FaultSteps

log = logging.getLogger(__name__)
#: What a policy's call may end with. An interrupt is the user's.
FAULTS = (Exception, SystemExit)


def whole(gamma: object) -> int:
    """Return a gamma as an int; -1 for what is no whole number, a boolean included."""
    try:
        return -1 if isinstance(gamma, bool | np.bool_) else operator.index(gamma)  # type: ignore[arg-type]
    except TypeError:
        return -1


class Wrapper(Policy):
    """Passes everything on to ``policy``; subclasses step in where they have to. Attributes are looked up there too."""

    def __init__(self, policy: Policy) -> None:
        # The base constructor is left out on purpose: ids, version and randomness are the wrapped policy's.
        self.policy = policy
        self.summary = policy.summary  # type: ignore[misc]
        self.learns = policy.learns  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name == "policy" or name.startswith("__"):  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.policy, name)

    def new_id(self) -> int:
        return self.policy.new_id()

    def first_time(self, id: int) -> bool:
        return self.policy.first_time(id)

    def has_learnt(self, id: int) -> bool:
        return self.policy.has_learnt(id)

    def begin(self, context: Context) -> None:
        self.policy.begin(context)

    def decide(self, context: Context) -> Decision:
        return self.policy.decide(context)

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        return self.policy.proceed(decision, draft)

    def submit(self, decision: Decision, draft: Draft) -> int:
        return self.policy.submit(decision, draft)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.policy.learn(decision, outcome)

    def pmf(self, context: Context) -> np.ndarray | None:
        return self.policy.pmf(context)

    def state_dict(self) -> State:
        return self.policy.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.policy.load_state_dict(state)

    def take_delta(self) -> State:
        return self.policy.take_delta()

    def merge(self, delta: State) -> None:
        self.policy.merge(delta)

    def info(self) -> dict[str, Any]:
        return self.policy.info()


class FaultGuard(FaultSteps, Wrapper):
    """Falls back to a fixed gamma where the policy raises, stalls, or answers with something impossible.

    Faults are counted by kind, and the first one is reported through :mod:`logging`. A gamma from 0 to 16 that is more
    than the step allows is no fault and is clipped. Decisions of the policy keep their ids; the guard's own have
    negative ids and are not shown to the policy, which could not know them.

    Parameters
    ----------
    policy : Policy
        The policy to guard.
    fallback_gamma : int
        Gamma of a step whose decision failed.
    stall_seconds : float
        A decision that takes longer is a fault, and so are longer calls in a step taken together, where the caller says
        how long they took: the policy sits out the next 1, 2, 4, ... up to 1,024 steps. (It cannot be interrupted, so
        the slow step itself is lost.)

    Attributes
    ----------
    faults : collections.Counter
        Number of faults by kind.
    """

    def __init__(self, policy: Policy, fallback_gamma: int = 4, stall_seconds: float = 1.0) -> None:
        if not 0 <= fallback_gamma <= MAX_GAMMA:
            raise PolicyError(f"fallback_gamma must be from 0 to {MAX_GAMMA}, got {fallback_gamma}")
        super().__init__(policy)
        self.fallback_gamma, self.stall_seconds = fallback_gamma, stall_seconds
        self.faults: Counter[str] = Counter()
        self._own_id = 0
        self._sit_out, self._penalty = 0, 1
        self._slow = 0  # id of the latest decision that stalled
        self._drafters: tuple[str, ...] = ()
        self.joint, self.in_steps = policy.joint, policy.in_steps
        self.rows = FaultRows(policy, self._checked, self._fallback, self._fault, FAULTS)

    def decide(self, context: Context) -> Decision:
        # Values of before the call: a policy may write to its context.
        self._drafters, most = context.drafters, context.max_gamma
        if self._sit_out:
            self._sit_out -= 1
            return self._fallback(most)
        started = perf_counter()
        try:
            decision = self.policy.decide(context)
            checked = self._checked(decision, most)
        except FAULTS as error:
            self._fault("decide raised", error)
            return self._fallback(most)
        if perf_counter() - started > self.stall_seconds:
            self._slow = decision.id
            self._stall(f"deciding took longer than {self.stall_seconds} s")
        return self._fallback(most) if checked is None else checked

    def rests(self, level: str, rows: int) -> bool:
        # While the policy sits out, nobody asks it anything.
        return False if self._sit_out else super().rests(level, rows)

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        if self._sit_out:
            self._sit_out -= 1
            return [self._fallback(context.max_gamma) for context in contexts]
        self._drafters = contexts[0].drafters
        return super().decide_rows(contexts, pads, may_drop)

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        if forward.policy_seconds > self.stall_seconds:
            self._stall(f"a step's calls took longer than {self.stall_seconds} s")
        super().learn_rows(decisions, outcomes, forward)

    def _checked(self, decision: Decision, most: int) -> Decision | None:
        """Return a decision, repaired where it can be, else None."""
        gamma = decision.gamma
        fine = type(gamma) is int and 0 <= gamma <= most and 0.0 < decision.propensity <= 1.0
        if type(decision.id) is not int or type(decision.policy_version) is not int:
            raise TypeError(f"id {decision.id!r} or version {decision.policy_version!r} is no whole number")
        if decision.drafter and decision.drafter not in self._drafters:
            self._fault("unknown drafter", f"asked for the drafter {decision.drafter!r}, not of {self._drafters}")
            decision = replace(decision, drafter="")
        return decision if fine else self._repaired(decision, most)

    def _repaired(self, decision: Decision, most: int) -> Decision | None:
        """Return the decision with a usable gamma clipped; count a fault and return None for any other."""
        gamma = whole(decision.gamma)
        if not 0 <= gamma <= MAX_GAMMA:
            self._fault("impossible gamma", f"decided on gamma {decision.gamma!r}")
            return None
        if not 0.0 < decision.propensity <= 1.0 + 1e-9:
            self._fault("impossible propensity", f"gave propensity {decision.propensity!r}")
            return None
        return replace(decision, gamma=min(gamma, most))

    def _fallback(self, most: int) -> Decision:
        self._own_id -= 1
        return Decision(self._own_id, min(self.fallback_gamma, most))

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        try:
            answer = self.policy.proceed(decision, draft)
            if answer is True or answer is False:
                return answer
            if isinstance(answer, np.bool_):
                return bool(answer)
            if isinstance(answer, str) and answer in self._drafters:
                return answer
            self._fault("impossible answer", f"proceed answered {answer!r}")
        except FAULTS as error:
            self._fault("proceed raised", error)
        return False

    def submit(self, decision: Decision, draft: Draft) -> int:
        try:
            answer = operator.index(self.policy.submit(decision, draft))
            if 0 <= answer <= draft.drafted:
                return answer
            self._fault("impossible answer", f"submits {answer} of {draft.drafted} drafted tokens")
        except FAULTS as error:
            self._fault("submit raised", error)
        return draft.drafted

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if type(decision.id) is not int or decision.id < 0:  # the guard's own, or one that the policy wrote to
            return
        # A stalled decision was counted when it was made.
        if outcome.policy_seconds > self.stall_seconds and decision.id != self._slow:
            self._stall(f"a step's calls took longer than {self.stall_seconds} s")
        try:
            if not outcome.drafted or isfinite(sum(outcome.signals.ravel().tolist())):  # quicker than numpy's
                self.policy.learn(decision, outcome)
            else:
                self._fault("signals that are no numbers", "such a step teaches nothing")
        except FAULTS as error:
            self._fault("learn raised", error)

    def set_costs(self, level: str, prior: CostPrior) -> None:
        """Tell the policy what is known of a level's times, if it wants to know."""
        tell = getattr(self.policy, "set_costs", None)
        if tell is None:
            return
        try:
            tell(level, prior)
        except FAULTS as error:
            self._fault("set_costs raised", error)

    def begin(self, context: Context) -> None:
        try:
            self.policy.begin(context)
        except FAULTS as error:
            self._fault("begin raised", error)

    def _stall(self, reason: str) -> None:
        self._fault("stalled", reason)
        self._sit_out, self._penalty = self._penalty, min(2 * self._penalty, 1024)

    def _fault(self, kind: str, reason: object) -> None:
        if not self.faults:
            if isinstance(reason, BaseException):
                reason = f"{type(reason).__name__}: {reason}"
            inner = self.policy
            while isinstance(inner, Wrapper):
                inner = inner.policy
            name = type(inner).__name__
            log.warning(
                "policy %s failed (%s: %s); such steps fall back to gamma %d", name, kind, reason, self.fallback_gamma
            )
        self.faults[kind] += 1

    def pmf(self, context: Context) -> np.ndarray | None:
        try:
            return self.policy.pmf(context)
        except FAULTS as error:
            self._fault("pmf raised", error)
            return None

    def state_dict(self) -> State:
        return self._arrays("state_dict", self.policy.state_dict)

    def take_delta(self) -> State:
        return self._arrays("take_delta", self.policy.take_delta)

    def _arrays(self, name: str, call: Callable[[], State]) -> State:
        """Return what a call returns if it is arrays of numbers, else nothing."""
        try:
            found = call()
            bad = [key for key, value in found.items() if np.asarray(value).dtype.kind not in "fiub"]
            if not bad and all(isinstance(key, str) for key in found):
                return found
            self._fault("impossible answer", f"{name} holds {bad or list(found)}, which are no numbers under names")
        except FAULTS as error:
            self._fault(f"{name} raised", error)
        return {}

    def merge(self, delta: State) -> None:
        try:
            self.policy.merge(delta)
        except PolicyError:
            raise  # of another policy: the caller's mistake
        except FAULTS as error:
            self._fault("merge raised", error)

    def load_state_dict(self, state: State) -> None:
        try:
            self.policy.load_state_dict(state)
        except PolicyError:
            raise
        except FAULTS as error:
            self._fault("load_state_dict raised", error)
            raise PolicyError(
                f"{type(self.policy).__name__} cannot load a state: {type(error).__name__}: {error}"
            ) from error

    def info(self) -> dict[str, Any]:
        try:
            found = self.policy.info()
            found = found if isinstance(found, dict) else {}
        except FAULTS as error:
            self._fault("info raised", error)
            found = {}
        return found | {"faults": dict(self.faults)} if self.faults else found
