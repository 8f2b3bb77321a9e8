"""The seconds that a policy takes of a step."""

from __future__ import annotations

from time import perf_counter

from policies.base import Context, Decision, Draft, Outcome, Policy


class PolicyTimer:
    """Passes on what a step asks of a policy, and counts the seconds.

    Attributes
    ----------
    deciding, learning : float
        Seconds of the latest step: of all calls up to ``submit``, and of ``learn``.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.deciding = self.learning = 0.0

    def decide(self, context: Context) -> Decision:
        """Ask the policy, and start counting anew."""
        started = perf_counter()
        decision = self._policy.decide(context)
        self.deciding = perf_counter() - started
        return decision

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        """Ask the policy."""
        started = perf_counter()
        answer = self._policy.proceed(decision, draft)
        self.deciding += perf_counter() - started
        return answer

    def submit(self, decision: Decision, draft: Draft) -> int:
        """Ask the policy."""
        started = perf_counter()
        answer = self._policy.submit(decision, draft)
        self.deciding += perf_counter() - started
        return answer

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Teach the policy."""
        started = perf_counter()
        self._policy.learn(decision, outcome)
        self.learning = perf_counter() - started
