"""`online` inside a serving engine: the number of drafts of a step, and how many of each request's are verified.

An engine drafts as many tokens as it was told before the step, for all requests at once, and shows no signals of them.
So the number is chosen by what is known before: how each request's drafts fared, and what a forward of so many tokens
takes. Of m drafted tokens per request, those that are worth their verification can be told apart by request. The choice
is the m, and the tokens, of the most tokens per second:

    (rows + sum of the survivals of the n likeliest tokens) / (V(rows + n) + D(m))

with V and D as :mod:`policies.costs.batch_costs` learns them. Once the drafts are there, D is spent: then the n
likeliest tokens of those that were drafted are sent, as many as are worth V(rows + n) - V(rows) at that rate.

What a fit to all steps says of drafts is checked against plain steps of the same minutes
(:mod:`policies.costs.paired`): rates are those of the fit, times what it is off there. So at each size some plain steps
come first, and a few are taken later where drafts are made for long.

Where nothing is drafted, nothing is learnt. So a share of the time (:data:`PROBES`) is set aside for steps that draft
although it does not seem to pay. The cheaper such a step is, the more often there is one. It is charged what it took,
which the fit may not foresee. An engine measures a step as a whole. So some probes are blind: they draft, and verify
nothing of it. That tells D apart from V.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import ClassVar, NamedTuple

import numpy as np

from policies.acceptance.by_history import HistoryModel
from policies.base import MAX_GAMMA, PolicyError, State
from policies.batches import MOST_ROWS, Forward
from policies.costs.batch_costs import BatchCosts, Guess
from policies.costs.cost_model import CostModel
from policies.costs.level_costs import HALF_LIFE
from policies.costs.paired import FEWEST, Paired
from policies.estimators.bayesian_linear import check_array
from policies.learned.online_rows import BatchCostModel
from policies.steps import Batch, Plan, StepPolicy

STATE_FORMAT = 1
#: Share of the time that probes may take, how much may be saved up for them in steps, and what a new size starts with.
PROBES, SAVED, START = 0.0075, 1.0, 2.0
#: A probe that costs more plain steps than this tries one draft more or less instead.
DEAR = 0.5
#: What to go by where nothing is known: engines run large batches well, and read many tokens at once.
GUESS = Guess(24.0, (0.03, 0.12, 0.012, 0.002))
#: Numbers of drafts that are probed, in turns.
TRIED = (1, 2, 4, 1, 3, 2, 8)
#: Of so many probes one is blind.
BLIND = 3
#: Steps over which the reading of a draft model that lags behind has to pay.
READING = 32.0
#: Steps that a choice goes on for: without drafts unasked, and with some, half as many as there are requests at most.
UNASKED, KEPT = 7, 7
#: How much better than no drafts a number has to look, as those that look best are those that are overrated: always,
#: and on top while no step with drafts was measured at this size.
MARGIN, UNPROVEN = 1.01, 0.06
#: Where drafts gain a share g, plain steps are measured after LATER g steps with drafts.
LATER = 800.0
#: A step counts as so many times its estimate at most.
STALL = 3.0


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


class OnlineEngine(StepPolicy):
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
        most = max(MOST_ROWS, most_rows) * (MAX_GAMMA + 1)
        self.batch_costs = BatchCostModel(CostModel(cost_half_life), most, GUESS)
        self.model = HistoryModel()
        self._credit: dict[str, float] = {}
        self._paired: dict[str, Paired] = {}
        # Of the latest probe: its level, tokens per second without it, what it was expected to cost less what it did,
        # and how many of its steps are to come.
        self._probed: tuple[str, float, float, int] = "", 0.0, 0.0, 0
        self._turn = 0
        # Of the latest choice: its level and rows, how many steps it may go on unasked, and seconds of such a step.
        self._idle: tuple[str, int] = "", 0
        self._left, self._plain = 0, 0.0
        self._latest: tuple[tuple[str, int, int, int, int], Choice | None] = ("", 0, 0, 0, 0), None
        self._kept = 0

    def rests(self, level: str, rows: int) -> bool:
        """Where nothing was drafted, whatever the choice rests on hardly changes: it holds for some steps."""
        if self._left and self._idle == (level, rows):
            self._left -= 1
            if level in self._credit:
                self._credit[level] += self.probes * self._plain
            return True
        return False

    def rested(self, level: str, rows: int, seconds: float) -> None:
        """What a plain step takes is what drafts have to beat."""
        self._observe(Forward(level, rows, rows, 0, 0, 0, seconds, 0.0, seconds))

    def _observe(self, forward: Forward) -> None:
        costs = self.batch_costs.level(forward.level)
        costs.observe(forward)
        if forward.seconds > 0.0 and costs.ready:
            self.paired(forward.level).observe(forward, costs)

    def paired(self, level: str) -> Paired:
        """Return the latest steps of a level and size, made on first use."""
        found = self._paired.get(level)
        if found is None:
            found = self._paired[level] = Paired()
        return found

    def plain_seconds(self, level: str, rows: int) -> float:
        costs = self.batch_costs.level(level)
        return self.paired(level).pace(costs) * costs.plain(rows) if costs.ready else 0.0

    def start(self, slot: int) -> None:
        self.model.start(slot)

    def plan(self, batch: Batch) -> Plan:
        level, costs = batch.level, self.batch_costs.level(batch.level)
        most = min(max(batch.limits), self.cap)
        if not costs.ready or not most:
            return Plan(self.new_id(), 0)
        if self.paired(level).ask_for_plain():
            self._idle, self._left = (level, len(batch.limits)), 1
            self._latest = self._latest[0], None
            return Plan(self.new_id(), 0)
        choice = self._choice(batch, most, costs)
        self._idle, self._left = (level, len(batch.limits)), 0 if choice.gamma else UNASKED
        return Plan(self.new_id(), choice.gamma, bool(choice.gamma), choice)

    def _choice(self, batch: Batch, most: int, costs: BatchCosts) -> Choice:
        """Return the choice of the step before where it still holds, else a new one."""
        rows = len(batch.limits)
        key = batch.level, rows, min(batch.limits), most, costs.version
        before, choice = self._latest
        if choice is not None and before == key and self._kept < min(KEPT, rows // 2) and not choice.probe:
            self._kept += 1
            self._credit[key[0]] = self._credit.get(key[0], 0.0) + self.probes * rows / choice.rate
            return choice
        choice = self._choose(batch, most, costs)
        self._latest, self._kept = (key, choice), 0
        if not choice.gamma:
            self.model.fade(1 + UNASKED)
        return choice

    def _choose(self, batch: Batch, most: int, costs: BatchCosts) -> Choice:
        """Return the number of drafts for the batch."""
        rows, looks_up, paired = len(batch.limits), batch.looks_up, self.paired(batch.level)
        pace = paired.pace(costs)
        dearer = pace * exp(paired.off(costs))
        verify = costs.seconds[rows : rows * (most + 1) + 1] + costs.rest * rows
        plain = rows / (pace * float(verify[0]))
        verify = dearer * verify
        wider = verify - verify[0]
        survival = self.model.survival(most)[batch.slots, :most]
        if min(batch.limits) < most:
            survival *= np.arange(1, most + 1) <= np.array(batch.limits)[:, None]
        drafting: np.ndarray = np.zeros(most)
        reading = 0.0
        if not looks_up:
            first, each_round, each, read = (dearer * seconds for seconds in costs.draft)
            reading = read * batch.unread
            drafting = first + reading / READING + (each_round + each * rows) * np.arange(1, most + 1)
        if batch.pads:  # all rows as wide as the widest
            gained = np.cumsum(survival.sum(axis=0))
            rates = (rows + gained) / (verify[rows::rows] + drafting)
        else:
            allowed = np.tri(most)[:, None, :] * survival  # by m, of each row the first m tokens
            values = -np.sort(-allowed.reshape(most, -1), axis=1)
            rates = ((rows + np.cumsum(values, axis=1)) / (verify[1:] + drafting[:, None])).max(axis=1)
        best, margin = int(rates.argmax()), MARGIN + UNPROVEN / (1 + paired.drafted)
        gamma, rate = (best + 1, float(rates[best])) if rates[best] > margin * plain else (0, plain)
        if gamma:
            paired.until = max(FEWEST, LATER * (rate / plain - 1.0))
            if looks_up:  # their number is settled once they are there
                gamma = most
        if not self.probes:
            return Choice(gamma, rate, wider, False)
        # What a probe costs: its seconds, less those that its tokens are expected to save.
        level, spent = batch.level, rows / plain
        self._plain = spent
        credit = self._credit.get(level, START * (1.0 + 1.0 / rows) * spent)
        tried = min(TRIED[self._turn % len(TRIED)], most)
        blind = not looks_up and self._turn % BLIND == 1
        busy, price = self._probed[-1] > 0, 0.0
        new = (blind or tried != gamma) and not busy
        near = gamma + 1 if gamma < most and (not gamma or self._turn % 2) else max(gamma - 1, 1)
        while new:
            taken = float(drafting[tried - 1] + verify[0 if blind else rows * tried]) + reading * (1.0 - 1.0 / READING)
            won = 0.0 if blind else float(survival[:, :tried].sum())
            price = max(taken - (rows + won) / rate, 0.0)
            if price <= DEAR * spent or tried == near:
                break
            tried = near
        probe = credit > price and new
        if probe:
            if not gamma:
                self._probed = level, rate, price, 2
            credit, gamma = credit - price, tried
        self._turn += probe or not (new or busy)
        if credit < max(SAVED * spent, price):
            credit += self.probes * spent
        self._credit[level] = credit
        return Choice(gamma, rate, wider, probe, probe and blind)

    def _charge(self, forward: Forward, costs: BatchCosts) -> None:
        """Settle what a probe cost with what it was expected to: the step that drafts, and the one that verifies."""
        level, rate, owed, left = self._probed
        paired = self.paired(level)
        told = paired.pace(costs) * exp(paired.off(costs)) * costs.step(forward)
        owed -= (min(forward.seconds, STALL * told) if forward.seconds > 0.0 else told) - forward.produced / rate
        if left == 1:
            credit = self._credit.get(level, 0.0)
            self._credit[level] = min(credit + owed, max(credit, SAVED * self._plain))
        self._probed = level, rate, owed, left - 1

    def keep(self, plan: Plan, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        choice: Choice | None = plan.features
        if choice is None or choice.probe:
            return [0] * len(counts) if choice is not None and choice.blind else list(counts)
        width = max(counts)
        values = self.model.survival(width)[slots, :width]
        if min(counts) < width:
            values *= np.arange(1, width + 1) <= np.array(counts)[:, None]
        values = values.ravel()
        order = (-values).argsort(kind="stable")[: len(choice.wider) - 1]
        net = values[order].cumsum() - choice.rate * choice.wider[1 : len(order) + 1]
        at = int(net.argmax())
        if net[at] <= 0.0:
            return [0] * len(counts)
        found: list[int] = np.bincount(order[: at + 1] // width, minlength=len(counts)).tolist()
        return found if min(counts) == width else [min(n, k) for n, k in zip(found, counts, strict=True)]

    def learn_step(
        self, plan: Plan, slots: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], forward: Forward
    ) -> None:
        if not self.first_time(plan.id):
            return
        costs = self.batch_costs.level(forward.level)
        if forward.seconds > 0.0 and not forward.rounds:
            forward.verify_seconds = forward.verify_seconds or forward.seconds - forward.policy_seconds
        if self._probed[-1]:
            self._charge(forward, costs)
        self._observe(forward)
        told = [(slot, a + (a < n), a) for slot, n, a in zip(slots, drafted, accepted, strict=True) if n]
        if told:
            self.model.add(*zip(*told, strict=True))
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
