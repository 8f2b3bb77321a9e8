"""Choosing the drafter: one copy of a policy per drafter, and Thompson sampling between the drafters.

Which drafter pays best depends on text and machine: a lookup costs nothing but has no proposal in new text, a model
costs a forward per token. Each drafter is played for a block of steps at a time, under its own copy of the inner
policy. Its rate r = sum(tokens) / sum(seconds) and the standard error of that ratio (Cochran, 1977, section 6.3) come
from sums that forget exponentially and that workers can add up; a rate drawn from its normal approximation decides the
next block. So every drafter is tried now and then, the less the clearer the choice is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from policies.base import LOOKUP, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.costs.prior import CostPrior
from policies.estimators.bayesian_linear import check_array
from policies.guards.fault import Wrapper

#: Steps of a drafter after which one of its steps counts half.
HALF_LIFE = 400.0
#: Seconds that a lookup takes per token, before it is measured.
LOOKUP_SECONDS = 1e-5
#: How many times a drafter's mean one step counts most.
STALL = 10.0
_COPIES = 8


class BestDrafter(Policy):
    """Plays the drafter with the best tokens per second; another policy sets gamma.

    Where there is one drafter only, this is the inner policy.

    Parameters
    ----------
    policy : str
        Spec of the inner policy; an option of its own follows a ``/``: ``best-drafter:fixed/4``, or by name
        ``best-drafter:policy=goodput/cap=4``.
    block : int
        Steps until the drafter is chosen anew. The first of a block is not counted: a draft model then reads what it
        missed.
    weights, acceptance : str
        Of the inner policy, where its spec does not say.
    """

    summary = "chooses the drafter (model, ngram, hybrid) by tokens per second, each under its own copy of a policy"
    learns = True
    positional: ClassVar[str] = "policy"

    def __init__(
        self,
        *,
        policy: str = "goodput",
        block: int = 12,
        weights: str = "",
        acceptance: str = "",
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        self.rng = np.random.default_rng([seed, worker, 1])  # the copies' own are of two numbers
        if block < 2:
            raise PolicyError(f"block must be at least 2 steps, got {block}")
        self.spec, self.block, self._options = policy.replace("/", ":", 1), block, (seed, worker)
        named = {"weights": weights, "acceptance": acceptance}
        self._defaults: dict[str, Any] = {name: value for name, value in named.items() if value}
        self.inner: dict[str, Policy] = {}
        self._priors: dict[str, CostPrior] = {}
        # By (level, drafter): steps, tokens, seconds, and the sums of their squares and of their product.
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._delta: dict[tuple[str, str], np.ndarray] = {}  # and, behind those, the number of steps
        self._name, self._left, self._fresh = "", 0, False
        self._keep = 0.5 ** (1.0 / HALF_LIFE)
        # What the counted steps of one block add up to, as older ones count less.
        self._enough = 0.999 * (1.0 - self._keep ** (block - 1)) / (1.0 - self._keep)
        self._copy("")

    def _copy(self, drafter: str) -> Policy:
        """Return the inner policy of a drafter, made at first use."""
        found = self.inner.get(drafter)
        if found is None:
            from policies.registry import make_policy  # it lists this module

            seed, worker = self._options
            # Copies count their decision ids in ranges of their own.
            found = make_policy(self.spec, seed=seed, worker=_COPIES * worker + len(self.inner), **self._defaults)
            inner = found.policy if isinstance(found, Wrapper) else found
            if isinstance(inner, BestDrafter) or len(self.inner) >= _COPIES:
                raise PolicyError("best-drafter cannot hold itself, nor more than seven drafters")
            self.inner[drafter] = found
            for level, prior in self._priors.items():
                self._tell(drafter, level, prior)
        return found

    def set_costs(self, level: str, prior: CostPrior) -> None:
        """Pass what is known of a level's times on to every copy; a lookup's drafts cost next to nothing."""
        self._priors[level] = prior
        for drafter in self.inner:
            self._tell(drafter, level, prior)

    def _tell(self, drafter: str, level: str, prior: CostPrior) -> None:
        tell = getattr(self.inner[drafter], "set_costs", None)
        if tell is not None:
            if drafter == LOOKUP:
                prior = replace(prior, draft_seconds=LOOKUP_SECONDS, catch_up_seconds=0.0, first_draft_seconds=0.0)
            tell(level, prior)

    def begin(self, context: Context) -> None:
        for drafter in context.drafters if len(context.drafters) > 1 else ("",):
            self._copy(drafter).begin(context)

    def decide(self, context: Context) -> Decision:
        if len(context.drafters) < 2:
            return self._copy("").decide(context)
        self._fresh = self._left <= 0 or self._name not in context.drafters
        if self._fresh:
            self._name, self._left = self._choose(context), self.block
        self._left -= 1
        # What is told of lookups is of the default drafter. A step begins with the drafter that was chosen; a copy may
        # leave it later.
        confidence = context.lookup_confidence if self._name == context.drafters[0] else 0.0
        told = replace(context, lookup_confidence=confidence, lookup_alternative=0.0)
        decision = replace(self._copy(self._name).decide(told), drafter=self._name)
        if self._fresh:
            self._skip(decision.id)
        return decision

    def _skip(self, id: int) -> None:
        """Leave a decision out of the rates."""
        self.first_time(id)

    def _choose(self, context: Context) -> str:
        """Draw a rate for each drafter and return the one with the highest; one hardly tried comes first."""
        best, name = -np.inf, context.drafters[0]
        for drafter in context.drafters:
            n, tokens, seconds, tt, ts, ss = self._sums.get((context.level, drafter), np.zeros(6)).tolist()
            if n < self._enough or seconds <= 0.0:
                return drafter
            rate = tokens / seconds
            error = np.sqrt(max(tt - 2 * rate * ts + rate * rate * ss, 0.0)) / seconds
            if (drawn := rate + error * self.rng.standard_normal()) > best:
                best, name = drawn, drafter
        return name

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        return self._copy(decision.drafter).proceed(decision, draft)

    def submit(self, decision: Decision, draft: Draft) -> int:
        return self._copy(decision.drafter).submit(decision, draft)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self._copy(decision.drafter).learn(decision, outcome)
        if not decision.drafter or not self.first_time(decision.id) or not 0.0 < outcome.seconds < 1e9:
            return
        key = (outcome.level, decision.drafter)
        tokens, seconds = float(outcome.produced), outcome.seconds
        if key in self._sums:  # a stall would be held against a drafter for as long as it is not played
            steps, _, taken = self._sums[key][:3].tolist()
            seconds = min(seconds, STALL * taken / steps)
        row = np.array([1.0, tokens, seconds, tokens * tokens, tokens * seconds, seconds * seconds])
        self._sums[key] = self._sums.get(key, 0.0) * self._keep + row
        self._delta[key] = self._delta.get(key, np.zeros(7)) * np.append(np.full(6, self._keep), 1.0) + [*row, 1.0]

    def pmf(self, context: Context) -> np.ndarray | None:
        return self._copy("").pmf(context) if len(context.drafters) < 2 else None

    def state_dict(self) -> State:
        return self._pack(self._sums) | {
            f"{drafter}/{key}": value for drafter, p in self.inner.items() for key, value in p.state_dict().items()
        }

    def load_state_dict(self, state: State) -> None:
        parts, sums = _by_drafter(state), self._unpack(state, 6)
        for drafter, part in parts.items():
            self._copy(drafter).load_state_dict(part)
        self._sums, self._delta = sums, {}

    def take_delta(self) -> State:
        delta = self._pack(self._delta)
        self._delta = {}
        return delta | {
            f"{drafter}/{key}": value for drafter, p in self.inner.items() for key, value in p.take_delta().items()
        }

    def merge(self, delta: State) -> None:
        parts, sums = _by_drafter(delta), self._unpack(delta, 7)
        for drafter, part in parts.items():
            self._copy(drafter).merge(part)
        for key, row in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) * self._keep ** row[6] + row[:6]

    @staticmethod
    def _pack(sums: dict[tuple[str, str], np.ndarray]) -> State:
        return {f"rates/{level}/{drafter}": row.copy() for (level, drafter), row in sums.items()}

    @staticmethod
    def _unpack(state: State, numbers: int) -> dict[tuple[str, str], np.ndarray]:
        found = {}
        for key in state:
            kind, _, rest = key.partition("/")
            if kind == "rates":
                level, _, drafter = rest.rpartition("/")
                found[level, drafter] = check_array(state, key, (numbers,)).copy()
        return found

    def info(self) -> dict[str, Any]:
        found = {f"{level}.{drafter}.rate": row[1] / row[2] for (level, drafter), row in self._sums.items()}
        for drafter, policy in self.inner.items():
            found |= {f"{drafter}.{key}" if drafter else key: value for key, value in policy.info().items()}
        return found


def _by_drafter(state: State) -> dict[str, State]:
    """Group ``<drafter>/<array>`` keys by drafter; the rates' keys are left out."""
    found: dict[str, State] = {}
    for key, value in state.items():
        drafter, slash, name = key.partition("/")
        if not slash:
            raise PolicyError(f"'{key}' is not of best-drafter: it was saved or handed out by another policy")
        if drafter != "rates":
            found.setdefault(drafter, {})[name] = value
    return found
