"""What is known of a step token by token, before and after each is drafted, as rows of two regressions."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p
from typing import TYPE_CHECKING, Any

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, NGRAM, Context
from policies.mlp16 import FADE
from policies.token_history import FEATURES, TAIL, Place, Seen, place

if TYPE_CHECKING:
    from policies.hazard import Hazard

#: Numbers of features before and after a token is drafted.
BEFORE, AFTER = 10 + FEATURES, 16

Token = tuple[float, float, float, float, float]
#: A token that took a forward: how many came before it, where its history is kept, the estimated chance that it is
#: accepted if those before it are, and NUMBERS that describe it: those of the token before it (of a step's first one,
#: the lagged ones), the step's acceptance and whether all was accepted last, its own, what its history tells
#: (:data:`~policies.token_history.Seen`), and again how many came before it.
Asked = tuple[int, Place, float, tuple[float, ...]]
NUMBERS = 16


def log_odds(confidence: float) -> float:
    """Log-odds of a probability, kept within -4 and 6, in thirds."""
    if confidence <= 0.0180:
        return -4.0 / 3.0
    if confidence >= 0.9975:
        return 2.0
    return log(confidence / (1.0 - confidence)) / 3.0


def token_features(row: list[float]) -> Token:
    """Describe a drafted token by its signals: log-odds, entropy, log margin, n-gram agreement and disagreement."""
    margin, n = row[MARGIN], row[NGRAM]
    return (
        log_odds(row[CONFIDENCE]),
        0.25 * row[ENTROPY],
        0.5 * log1p(margin) if margin > 0.0 else 0.0,
        0.5 + 0.125 * n if n > 0.0 else 0.0,
        0.5 - 0.125 * n if n < 0.0 else 0.0,
    )


def start_features(context: Context) -> tuple[float, float, float, float]:
    """Describe the context of a step: acceptance, whether all was accepted last, lagged log-odds and entropy.

    While nothing is drafted all but the second fade towards neutral values.
    """
    whole = 1.0 if 0 < context.last_drafted == context.last_accepted else 0.0
    acceptance, odds, entropy = 2.0 * context.acceptance - 1.0, log_odds(context.mean_confidence), context.mean_entropy
    if not context.idle:
        return acceptance, whole, odds, 0.25 * entropy
    f = FADE**context.idle
    return f * acceptance, whole, f * odds, 0.5 + f * (0.25 * entropy - 0.5)


def rows(numbers: np.ndarray) -> np.ndarray:
    """Spread what is known of tokens out into the features of both regressions, before and after they are drafted.

    What the draft's own signals tell depends on whether an n-gram lookup proposes the same token, another, or none, so
    each of the first two cases has weights of its own beside the common ones.

    Parameters
    ----------
    numbers : ndarray, shape (N, NUMBERS)
        See :data:`Asked`.

    Returns
    -------
    ndarray, shape (2, N, 16)
    """
    found = np.zeros((2, len(numbers), BEFORE))
    before, after = found
    found[:, :, 0] = 1.0
    at, first = np.minimum(0.125 * numbers[:, 15], 1.0), numbers[:, 15] == 0.0
    before[:, 1:8] = numbers[:, :7]
    before[:, 8], before[:, 9] = at, first
    longest = numbers[:, 12].astype(int)
    (seen,) = longest.nonzero()
    before[seen, 9 + abs(longest[seen])] = np.sign(longest[seen])
    before[:, 14:] = numbers[:, 13:15]
    after[:, 1:4] = numbers[:, 7:10]
    after[:, 4], after[:, 5], after[:, 6] = numbers[:, 5], numbers[:, 0], at
    after[:, 7] = numbers[:, 6] * first
    for case, column in ((8, 10), (12, 11)):
        whether = numbers[:, column] > 0.0
        after[:, case], after[:, case + 1] = whether, numbers[:, column]
        after[:, case + 2 : case + 4] = numbers[:, 7:9] * whether[:, None]
    return found


class Step:
    """A step under way, described as far as it has got; what a policy keeps as ``Decision.features``.

    Attributes
    ----------
    asked : list
        The tokens so far that took a forward of the draft model, see :data:`Asked`. Of the others, a lookup's, the
        drafter tells the chance.
    survival : list of float
        Estimated chance that all of the first k tokens are accepted, k = 0, 1, ...
    level : str
        The context's compression level.
    memory : dict
        How drafts after the same tokens fared in this text.
    forwards : int
        How many of the tokens so far took a forward of the draft model.
    left : int
        How many accepted tokens end the text, with the target's own: drafting more is of no use.
    expected : float
        Tokens that the step produces on average if no more are drafted: the sum of ``survival``.
    rule : object
        What the policy decides the step by; its own affair.
    """

    __slots__ = (
        "_acceptance",
        "_after",
        "_before",
        "_chance",
        "_context",
        "_hazard",
        "_ids",
        "_known",
        "_lagged",
        "_next",
        "_number",
        "_signals",
        "_tokens",
        "_whole",
        "asked",
        "expected",
        "forwards",
        "left",
        "level",
        "memory",
        "rule",
        "survival",
    )

    def __init__(self, context: Context, hazard: Hazard) -> None:
        self._context, self._number, self._hazard = context, context.step, hazard
        # Copies of a policy may share a context, each with acceptances of its own.
        self.memory = context.memory.setdefault(hazard.history, {})
        self.level = context.level
        self._acceptance, self._whole, odds, entropy = start_features(context)
        self._lagged: Token = (odds, entropy, 0.0, 0.0, 0.0)
        self._before, self._after = hazard.weights(context.level)
        self.asked: list[Asked] = []
        self.survival = [1.0]
        self.expected = 1.0
        self.forwards, self.left = 0, context.remaining - 1
        # Described only if a token that takes a forward comes next: a lookup's signals tell nothing of its own chance.
        self._tokens: list[Token | None] = []
        self._signals: Any = ()
        # The last tokens of the context, up to four, and those drafted while the context told of them.
        self._ids = list(context.tokens[-TAIL:])
        self._known = len(self._ids)
        self._next: tuple[Place, Seen, Token] | None = None
        self._chance = 0.0
        self.rule: Any = None

    def lookups(self) -> tuple[float, float]:
        """How sure the drafter is of the next token if that takes no forward of a model, else 0; and of the lookup that
        it could be instead, 0 if there is none."""
        context = self._context
        lookups, offer = context.lookups, context.offer
        if not (lookups or offer) or context.step != self._number:
            return 0.0, 0.0
        j = len(self._tokens)
        return lookups[j] if j < len(lookups) else 0.0, offer

    def chance(self) -> float:
        """Chance that the next token, which takes a forward, is accepted if those before it are."""
        if self._next is not None:
            return self._chance
        j, ids = len(self._tokens), self._ids
        at = self._known + j
        here = place(tuple(ids[at - TAIL if at > TAIL else 0 : at]) if self._known and at <= len(ids) else ())
        seen = longest, one, two = self._hazard.history.look(self.memory, here)
        # The sums over `rows`, zeros left out: this is asked for every token.
        w, acceptance, whole = self._before, self._acceptance, self._whole
        eta = w[0] + w[6] * acceptance + w[7] * whole + w[14] * one + w[15] * two
        if longest > 0:
            eta += w[9 + longest]
        elif longest:
            eta -= w[9 - longest]
        if j:
            previous = self._tokens[-1] or token_features(self._signals[j - 1].tolist())
            eta += w[8] * (j * 0.125 if j < 8 else 1.0)
        else:
            previous = self._lagged
            eta += w[9]
        a, b, c, d, e = previous
        eta += w[1] * a + w[2] * b + w[3] * c + w[4] * d + w[5] * e
        p = 1.0 / (1.0 + exp(-eta)) if eta > -30.0 else 0.0  # also where a signal is no number
        self._next, self._chance = (here, seen, previous), p
        return p

    def extend(self, drafted: int, signals: np.ndarray) -> None:
        """Take in the signals of the first ``drafted`` tokens, and their ids while the context has them."""
        tokens, context = self._tokens, self._context
        j = len(tokens)
        if j >= drafted:
            return
        lookups: Sequence[float] = ()
        if context.step == self._number:
            lookups, ids, known = context.lookups, self._ids, self._known
            if known:
                ids += context.drafts[len(ids) - known : drafted]
        self._signals, told = signals, len(lookups)
        survivals, survival, expected = self.survival, self.survival[j], self.expected
        while j < drafted:
            chance = lookups[j] if j < told else 0.0
            if chance:
                tokens.append(None)
            else:
                if self._next is None:
                    self.chance()
                here, seen, previous = self._next  # type: ignore[misc]
                own = token_features(signals[j].tolist())
                chance = self._own_chance(own, previous, j)
                tokens.append(own)
                about = (*previous, self._acceptance, self._whole, *own, *seen, float(j))
                self.asked.append((j, here, chance, about))
                self.forwards += 1
            self._next = None
            survival *= chance
            survivals.append(survival)
            expected += survival
            j += 1
        self.expected = expected

    def _own_chance(self, own: Token, previous: Token, j: int) -> float:
        """Chance of the j-th token (from 0) once it is drafted."""
        w, (odds, entropy, margin, agree, differ) = self._after, own
        eta = w[0] + w[1] * odds + w[2] * entropy + w[3] * margin + w[4] * self._acceptance + w[5] * previous[0]
        eta += w[6] * (j * 0.125 if j < 8 else 1.0) if j else w[7] * self._whole
        if agree:
            eta += w[8] + w[9] * agree + w[10] * odds + w[11] * entropy
        elif differ:
            eta += w[12] + w[13] * differ + w[14] * odds + w[15] * entropy
        return 1.0 / (1.0 + exp(-eta)) if eta > -30.0 else 0.0

    def note(self, tested: int, accepted: int) -> None:
        """Note in the history which of the tested tokens were accepted."""
        for j, where, _, _ in self.asked:
            if j < tested:
                self._hazard.history.note(self.memory, where, j < accepted)
