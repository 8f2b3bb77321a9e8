"""The part of `online` that decides batches; the rule is in :mod:`policies.learned.batch_rule`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import log

import numpy as np

from policies.acceptance.model import AcceptanceModel
from policies.acceptance.step import Step
from policies.base import LOOKUP, Context, Decision, Draft, Outcome, State
from policies.batches import Forward, JointPolicy
from policies.costs.batch_costs import USUAL, BatchCosts, Guess
from policies.costs.batch_grid import MOST
from policies.costs.cost_aware import CostAware
from policies.costs.cost_model import CostModel, split_levels
from policies.learned.batch_rule import DEBT, DOUBTFUL, FEW, PATIENCE, USED, Account, Prices, RowStep

KEY = "batch_costs."


def base_of(level: str) -> str:
    """Return a level's name without the batch's size."""
    return level.partition("@")[0]


class BatchCostModel:
    """:class:`~policies.costs.batch_costs.BatchCosts` by compression level.

    Parameters
    ----------
    costs : CostModel
        Of single decoding: what is known there gives a new level's costs their shape.
    most, guess
        As for them.
    """

    def __init__(self, costs: CostModel, most: int = MOST, guess: Guess = USUAL) -> None:
        self._alone, self.most, self.guess, self.levels = costs, most, guess, dict[str, BatchCosts]()

    def level(self, name: str) -> BatchCosts:
        """Return the costs of a level, named with or without a batch's size; made on first use."""
        name = base_of(name)
        found = self.levels.get(name)
        if found is None:
            alone = self._alone.levels.get(name)
            found = self.levels[name] = BatchCosts(self._alone.half_life, alone, self.most, self.guess)
        return found

    def state(self) -> State:
        """All levels' states."""
        return {f"{KEY}{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.state().items()}

    def take_delta(self) -> State:
        """All levels' sums since the last call."""
        return {f"{KEY}{n}.{k}": v for n, costs in self.levels.items() for k, v in costs.take_delta().items()}

    def load(self, state: State) -> None:
        """Restore :meth:`state`; states of versions without batches have none."""
        self.levels = {}
        for name, part in split_levels(state, KEY).items():
            self.level(name).load(part)

    def merge(self, delta: State) -> None:
        """Add another copy's sums."""
        for name, part in split_levels(delta, KEY).items():
            self.level(name).merge(part)


class OnlineRows(CostAware, JointPolicy):
    """Decides the rows of a batch together."""

    cap: int
    lookups: bool
    learning: str
    acceptance_model: AcceptanceModel

    def start_batches(self) -> None:
        """Make what batches need; for the constructor."""
        self.batch_costs = BatchCostModel(self.costs)
        self._accounts: dict[str, Account] = {}
        self._prices: dict[tuple[str, int, bool, bool], tuple[int, float, Prices]] = {}
        # Of the step under way: what is expected of the draft, and what share of such gains comes true.
        self._expected, self._factor = 0.0, 1.0

    def account(self, level: str) -> Account:
        """Return how a level's batches of about one size fare."""
        found = self._accounts.get(level)
        if found is None:
            found = self._accounts[level] = Account()
        return found

    def _priced(self, level: str, rows: int, gain: float, pads: bool, may_drop: bool) -> Prices:
        """Return the prices of a step under the latest costs."""
        costs, key = self.batch_costs.level(level), (base_of(level), rows, pads, may_drop)
        found = self._prices.get(key)
        if found is None or found[0] != costs.version or abs(found[1] - gain) > 0.02 * gain:
            found = self._prices[key] = costs.version, gain, Prices.of(costs, rows, gain, pads, may_drop)
        return found[2]

    def decide_rows(self, contexts: Sequence[Context], pads: bool, may_drop: bool) -> list[Decision]:
        level, rows = contexts[0].level, len(contexts)
        limits = [min(self.cap, c.max_gamma) for c in contexts]
        if not self.timed:
            return [self._asking(c, limit, None, 1.0) for c, limit in zip(contexts, limits, strict=True)]
        costs, account = self.batch_costs.level(level), self.account(level)
        self._expected, self._factor = 0.0, account.factor
        if not costs.ready:
            return [self._plain() for _ in contexts]
        prices = self._priced(level, rows, account.gain, pads, may_drop)
        worth = prices.worth([c.remaining for c in contexts])
        room = np.array(limits) > 0
        free = np.array([max(c.lookup_confidence, c.lookup_alternative if self.lookups else 0.0) for c in contexts])
        looks = np.where(room, prices.lookup(free, worth), 0.0)
        steps, nobody = list[Step | None]([None] * rows), list[Step | None]([None] * rows)
        known = costs.told or costs.doubt(rows, 2 * rows) < DOUBTFUL
        account.waited += not known
        if known or account.waited > PATIENCE:
            steps = self._weigh(contexts, prices, worth, room, looks, account) or nobody
        found = []
        for i, (context, limit) in enumerate(zip(contexts, limits, strict=True)):
            if (step := steps[i]) is not None:
                kept = RowStep(step, prices, float(worth[i]))
                found.append(Decision(self.new_id(), limit, True, 1.0, self.version, kept))
            elif looks[i] > 0.0:
                found.append(self._looking(context, limit, prices, float(worth[i]), float(free[i])))
            else:
                found.append(self._plain())
        return found

    def _weigh(
        self,
        contexts: Sequence[Context],
        prices: Prices,
        worth: np.ndarray,
        room: np.ndarray,
        looks: np.ndarray,
        account: Account,
    ) -> list[Step | None] | None:
        """Return the steps of the rows that the model drafts for; None if it does for no row."""
        rows = len(contexts)
        # What may be gained at most is known without a look at the rows: that of tokens which are surely accepted.
        if prices.slope + prices.each + prices.each_round / rows >= worth.max():
            return None
        steps = [Step(context, self.acceptance_model) for context in contexts]
        chance = np.array([step.chance() for step in steps])
        gains = np.where(room, account.factor * prices.plan(chance, worth), 0.0)
        expected, going = prices.rounds(gains, looks, False)
        if expected <= 0.0:
            return None
        drafts = going.tolist()
        read = sum(c.unread for c, goes in zip(contexts, drafts, strict=True) if goes)
        if read > FEW * rows:
            # What it costs is sure, what it brings is not.
            dear = prices._replace(slope=prices.most)
            gains = np.where(going, account.factor * dear.plan(chance, worth), 0.0)
            sure, left = dear.rounds(gains, looks, False)[0], sum(c.remaining for c in contexts) / rows
            if account.net < -DEBT or USED * sure * left / account.gain <= prices.read * read:
                return None
        self._expected = expected
        return [step if goes else None for step, goes in zip(steps, drafts, strict=True)]

    def _plain(self) -> Decision:
        return Decision(self.new_id(), 0, False, 1.0, self.version, RowStep(None, None, 1.0))

    def _asking(self, context: Context, limit: int, prices: Prices | None, worth: float) -> Decision:
        step = Step(context, self.acceptance_model)
        return Decision(self.new_id(), limit, True, 1.0, self.version, RowStep(step, prices, worth))

    def _looking(self, context: Context, limit: int, prices: Prices, worth: float, free: float) -> Decision:
        """Return the decision to look up: as many tokens as may still be worth it, about."""
        fall = -log(min(max(free, 0.05), 0.97))
        most = 2 + int(2.0 * max(log(worth / prices.slope), 0.0) / fall) if prices.slope > 0.0 else limit
        name = "" if context.lookup_confidence else LOOKUP
        kept = RowStep(None, prices, worth)
        return Decision(self.new_id(), min(limit, most), bool(not name), 1.0, self.version, kept, name, True)

    def proceed_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[bool | str]:
        answers: list[bool | str] = [True] * len(decisions)
        asked: list[tuple[int, Step, RowStep]] = []
        for i, (decision, draft) in enumerate(zip(decisions, drafts, strict=True)):
            kept: RowStep = decision.features
            if kept.step is None:  # of a drafter that looks up by itself: not beyond its lookups
                answers[i] = bool(draft.lookups[draft.drafted])
                continue
            kept.step.extend(draft.drafted, draft)
            asked.append((i, kept.step, kept))
        prices = asked[0][2].prices if asked else None
        if prices is None:
            return answers
        here = [drafts[i] for i, _, _ in asked]
        value = np.array([kept.worth * step.survival[-1] for _, step, kept in asked])
        sure = np.array([step.confidence for _, step, _ in asked])
        chance = np.array([0.0 if step.confidence else step.chance() for _, step, _ in asked])
        other = np.array([draft.lookup_alternative if self.lookups else 0.0 for draft in here])
        looks = prices.lookup(np.maximum(sure, other), value)
        total, going = prices.rounds(self._factor * prices.plan(chance, value), looks, True)
        for (i, _, _), goes, look, free in zip(asked, going.tolist(), looks.tolist(), sure.tolist(), strict=True):
            answers[i] = total > 0.0 if goes else (True if free else LOOKUP) if look > 0.0 else False
        return answers

    def submit_rows(self, decisions: Sequence[Decision], drafts: Sequence[Draft]) -> list[int]:
        survivals, worth, prices = list[list[float]](), list[float](), None
        for decision, draft in zip(decisions, drafts, strict=True):
            kept: RowStep = decision.features
            prices = kept.prices or prices
            worth.append(kept.worth)
            if kept.step is not None:
                kept.step.extend(draft.drafted, draft)
                survivals.append(kept.step.survival[1 : draft.drafted + 1])
            else:
                survivals.append(np.cumprod(draft.lookups[: draft.drafted]).tolist())
        if prices is None:
            return [draft.drafted for draft in drafts]
        return prices.best(survivals, worth)

    def learn_rows(self, decisions: Sequence[Decision], outcomes: Sequence[Outcome], forward: Forward) -> None:
        level = forward.level
        costs, account = self.batch_costs.level(level), self.account(level)
        if not self.first_time(decisions[0].id):
            return
        for decision in decisions[1:]:
            self.first_time(decision.id)
        frozen = self.learning == "none"
        if not frozen:
            costs.observe(forward)
        if not costs.ready:
            return
        for decision, outcome in zip(decisions, outcomes, strict=True):
            step = decision.features.step
            if step is not None and outcome.labelled:
                self.teach_step(step, outcome)
                if not frozen and self.drift is not None and self.drift.add(outcome):
                    self.forget()
        if not frozen:
            self._book(account, costs, decisions, outcomes, forward)
        self._expected = 0.0

    def _book(
        self,
        account: Account,
        costs: BatchCosts,
        decisions: Sequence[Decision],
        outcomes: Sequence[Outcome],
        forward: Forward,
    ) -> None:
        """Take into the account what a step gained, and what was expected."""
        token = costs.plain(forward.rows) / forward.rows
        account.add(float(sum(o.produced for o in outcomes)), costs.step(forward) / token)
        if not (self._expected and forward.rounds):
            return
        true, prices = 0.0, None
        for decision, outcome in zip(decisions, outcomes, strict=True):
            kept: RowStep = decision.features
            prices = prices or kept.prices
            if kept.step is None or kept.prices is None or not outcome.forwards:
                continue
            modelled = min(outcome.forwards, outcome.drafted)
            true += kept.worth * min(outcome.accepted, modelled) - kept.prices.slope * modelled
            true -= kept.prices.each * outcome.forwards
        if prices is not None:
            true -= prices.first + prices.each_round * forward.rounds
            account.expected += self._expected
            account.true += max(true, -3.0 * self._expected)
            account.net += true - prices.read * forward.read

    @abstractmethod
    def teach_step(self, step: Step, outcome: Outcome) -> None:
        """Learn acceptance from a step."""
