"""`online` inside a serving engine: the number of drafts of a step, and how many of each request's are verified.

An engine drafts as many tokens as it was told before the step, for all requests at once, and shows no signals of them.
So the number is chosen by what is known before: how each request's drafts fared, and what a forward of so many tokens
takes. Of m drafted tokens per request, those that are worth their verification can be told apart by request. The choice
is the m, and the tokens, of the most tokens per second:

    (rows + sum of the survivals of the n likeliest tokens) / (V(rows + n) + D(m))

with V and D as :mod:`policies.costs.batch_costs` learns them. Once the drafts are there, D is spent: then the n
likeliest tokens of those that were drafted are sent, as many as are worth V(rows + n) - V(rows) at that rate.

Where nothing is drafted, nothing is learnt. So a share of the time (:data:`PROBES`) is set aside for steps that draft
although it does not seem to pay. The cheaper such a step is, the more often there is one. An engine measures a step as
a whole. So some probes are blind: they draft, and verify nothing of it. That tells D apart from V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from policies.acceptance.by_history import HistoryModel, Request
from policies.base import LOOKUP, MAX_GAMMA, Context, Decision, Draft, Outcome, PolicyError, State
from policies.batches import MOST_ROWS, Forward, JointPolicy
from policies.costs.batch_costs import BatchCosts
from policies.costs.cost_model import CostModel
from policies.costs.level_costs import HALF_LIFE
from policies.estimators.bayesian_linear import check_array
from policies.learned.online_rows import BatchCostModel

STATE_FORMAT = 1
#: Share of the time that probes may take, how much may be saved up for them in steps, and what a new size starts with.
PROBES, SAVED, START = 0.0075, 1.0, 2.0
#: Numbers of drafts that are probed, in turns.
TRIED = (1, 2, 4, 1, 3, 2, 8)
#: Of so many probes one is blind.
BLIND = 3
#: Steps over which the reading of a draft model that lags behind has to pay.
READING = 32.0
#: Steps that a choice goes on for: without drafts unasked, and with some.
UNASKED, KEPT = 7, 3
#: How much better than no drafts a number has to look, as those that look best are those that are overrated.
MARGIN = 1.01


class Choice(NamedTuple):
    """What a step's decisions have in common.

    Attributes
    ----------
    gamma : int
        Drafts for the batch.
    rate : float
        Tokens per second that are expected of such steps; what a verified token has to be worth.
    wider : ndarray
        By n, the seconds that n more tokens in the forward take.
    probe, blind : bool
        Whether it drafts to learn, and whether it verifies nothing of it.
    """

    gamma: int
    rate: float
    wider: np.ndarray
    probe: bool
    blind: bool = False


class OnlineEngine(JointPolicy):
    """Drafts for a batch by goodput, without the drafts' signals.

    Parameters
    ----------
    cap : int
        Most tokens to draft.
    cost_half_life : float
        Steps after which a measured time counts half.
    most_rows : int
        Most requests of a step.
    probes : float
        Share of the time for steps that draft to learn; 0 for none.
    seed, worker
        As in :class:`~policies.base.Policy`.
    """

    summary = "`online` inside a serving engine, by the history of requests and measured seconds"
    learns = True
    guarded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        cap: int = MAX_GAMMA,
        cost_half_life: float = HALF_LIFE,
        most_rows: int = MOST_ROWS,
        probes: float = PROBES,
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= cap <= MAX_GAMMA or not 1 <= most_rows <= 4096 or not 0 <= probes < 1 or cost_half_life < 1:
            raise PolicyError("cap must be 0 to 16, most_rows 1 to 4096, probes below 1, cost_half_life at least 1")
        self.cap, self.probes = cap, probes
        self.batch_costs = BatchCostModel(CostModel(cost_half_life), max(MOST_ROWS, most_rows) * (MAX_GAMMA + 1))
        self.model = HistoryModel()
        self._credit: dict[str, float] = {}
        self._turn = 0
        # Of the latest choice: its level and rows, how many steps it may go on unasked, and seconds of such a step.
        self._idle: tuple[str, int] = "", 0
        self._left, self._plain = 0, 0.0
        self._latest: tuple[tuple[str, int, int, int], Choice] | None = None
        self._kept = 0

    def rests(self, level: str, rows: int) -> bool:
        """Where nothing was drafted, whatever the choice rests on hardly changes: it holds for some steps."""
        if self._left and self._idle == (level, rows):
            self._left -= 1
            self._credit[level] = self._credit.get(level, 0.0) + self.probes * self._plain
            return True
        return False

    def decide(self, context: Context) -> Decision:
        return self.decide_rows([context], False, True)[0]

    def submit(self, decision: Decision, draft: Draft) -> int:
        return self.submit_rows([decision], [draft])[0]

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        forwards = 0 if outcome.drafter == LOOKUP else outcome.forwards
        forward = Forward(
            outcome.level, 1, 1 + outcome.drafted, forwards, forwards, outcome.caught_up, outcome.seconds,
            outcome.draft_seconds, outcome.verify_seconds, outcome.policy_seconds,
        )  # fmt: skip
        self.learn_rows([decision], [outcome], forward)

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        limits = [min(self.cap, context.max_gamma) for context in contexts]
        requests = [context.memory.get(self) or self._request(context) for context in contexts]
        costs = self.batch_costs.level(contexts[0].level)
        if not costs.ready or not any(limits):
            return [Decision(self.new_id(), 0, False, 1.0, self.version, (request, None)) for request in requests]
        choice = self._choice(contexts, limits, requests, costs, pads)
        level = contexts[0].level
        self._idle, self._left = (level, len(limits)), 0 if choice.gamma else UNASKED
        ask = bool(choice.gamma)
        return [
            Decision(self.new_id(), min(choice.gamma, limit), False, 1.0, self.version, (request, choice), "", ask)
            for request, limit in zip(requests, limits, strict=True)
        ]

    def _request(self, context: Context) -> Request:
        found = context.memory[self] = Request()
        return found

    def _choice(
        self, contexts: Sequence[Context], limits: list[int], requests: list[Request], costs: BatchCosts, pads: bool
    ) -> Choice:
        """Return the choice of the step before where it still holds, else a new one."""
        key = contexts[0].level, len(limits), min(limits), max(limits)
        if self._latest is not None and self._latest[0] == key and self._kept < KEPT and not self._latest[1].probe:
            self._kept += 1
            choice = self._latest[1]
            self._credit[key[0]] = self._credit.get(key[0], 0.0) + self.probes * len(limits) / choice.rate
            return choice
        choice = self._choose(contexts, limits, requests, costs, pads)
        self._latest, self._kept = (key, choice), 0
        return choice

    def _choose(
        self, contexts: Sequence[Context], limits: list[int], requests: list[Request], costs: BatchCosts, pads: bool
    ) -> Choice:
        """Return the number of drafts for the batch."""
        rows, most = len(limits), max(limits)
        verify = np.array(costs.verify[rows : rows * (most + 1) + 1]) + costs.rest * rows
        wider = verify - verify[0]
        survival = self.model.survival(self.model.describe(requests), most)
        if min(limits) < most:
            survival *= np.arange(1, most + 1) <= np.array(limits)[:, None]
        plain = rows / verify[0]
        drafting: np.ndarray = np.zeros(most)
        looks_up = contexts[0].drafters[:1] == (LOOKUP,)
        if not looks_up:
            first, each_round, each, read = costs.draft
            reading = read * sum(context.unread for context in contexts) / READING
            drafting = first + reading + (each_round + each * rows) * np.arange(1, most + 1)
        if pads:  # all rows as wide as the widest
            gained = np.cumsum(survival.sum(axis=0))
            rates = (rows + gained) / (verify[rows::rows] + drafting)
        else:
            allowed = np.tri(most)[:, None, :] * survival  # by m, of each row the first m tokens
            values = -np.sort(-allowed.reshape(most, -1), axis=1)
            rates = ((rows + np.cumsum(values, axis=1)) / (verify[1:] + drafting[:, None])).max(axis=1)
        best = int(rates.argmax())
        gamma, rate = (best + 1, float(rates[best])) if rates[best] > MARGIN * plain else (0, plain)
        if gamma and looks_up:  # their number is settled once they are there
            gamma = most
        if not self.probes:
            return Choice(gamma, rate, wider, False)
        # What a probe costs: its seconds, less those that its tokens are expected to save.
        level, spent = contexts[0].level, rows / plain
        self._plain = spent
        credit = self._credit.get(level, START * spent) + self.probes * spent
        tried = min(TRIED[self._turn % len(TRIED)], most)
        blind = not looks_up and self._turn % BLIND == 1
        new, price = blind or tried != gamma, 0.0
        if new:
            taken = float(drafting[tried - 1] + verify[0 if blind else rows * tried])
            won = 0.0 if blind else float(survival[:, :tried].sum())
            price = max(taken - (rows + won) / rate, 0.0)
        probe = credit > price and new
        if probe:
            credit, gamma = credit - price, tried
        self._turn += probe or not new
        self._credit[level] = min(credit, max(SAVED * spent, price))
        return Choice(gamma, rate, wider, probe, probe and blind)

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        return [True] * len(decisions)

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        counts = [draft.drafted for draft in drafts]
        choice = next((d.features[1] for d in decisions if d.features[1] is not None), None)
        if choice is None or choice.probe or not sum(counts):
            return [0] * len(counts) if choice is not None and choice.blind else counts
        survival = self.model.survival(self.model.describe([d.features[0] for d in decisions]), max(counts))
        values = (survival * (np.arange(1, max(counts) + 1) <= np.array(counts)[:, None])).ravel()
        order = np.argsort(-values, kind="stable")[: len(choice.wider) - 1]
        net = np.cumsum(values[order]) - choice.rate * choice.wider[1 : len(order) + 1]
        at = int(net.argmax())
        if net[at] <= 0.0:
            return [0] * len(counts)
        found: list[int] = np.bincount(order[: at + 1] // max(counts), minlength=len(counts)).tolist()
        return [min(n, k) for n, k in zip(found, counts, strict=True)]

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        fresh = [self.first_time(decision.id) for decision in decisions]
        if not fresh[0]:
            return
        costs = self.batch_costs.level(forward.level)
        if forward.seconds > 0.0 and not forward.verify_seconds:
            if forward.rounds and costs.ready:
                costs.share(forward)
            elif not forward.rounds:
                forward.verify_seconds = forward.seconds - forward.policy_seconds
        costs.observe(forward)
        pairs = zip(decisions, outcomes, strict=True)
        told = [(d.features[0], outcome) for d, outcome in pairs if d.features is not None and outcome.labelled]
        if told:
            requests = [request for request, _ in told]
            self.model.add(self.model.describe(requests), [o.labelled for _, o in told], [o.accepted for _, o in told])
            for request, outcome in told:
                request.note(outcome.accepted, outcome.labelled)
            self.version += 1

    def state_dict(self) -> State:
        return {"engine.format": np.array(STATE_FORMAT)} | self.model.state() | self.batch_costs.state()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "engine.format", ())) != STATE_FORMAT:
            raise PolicyError(f"not a state of format {STATE_FORMAT} of this policy: another version saved it")
        self.model.load(state)
        self.batch_costs.load(state)
        self.version += 1

    def take_delta(self) -> State:
        return self.model.take_delta() | self.batch_costs.take_delta()

    def merge(self, delta: State) -> None:
        self.model.merge(delta)
        self.batch_costs.merge(delta)
        self.version += 1
