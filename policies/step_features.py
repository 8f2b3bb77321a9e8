"""What is known of a step token by token, before and after each is drafted, as rows of two regressions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, NGRAM, Context
from policies.mlp16 import FADE
from policies.token_history import FEATURES, TAIL, Place, Tail, place

if TYPE_CHECKING:
    from policies.hazard import Hazard

#: Numbers of features before and after a token is drafted.
BEFORE, AFTER = 10 + FEATURES, 16

Token = tuple[float, float, float, float, float]
_OTHER, _NEITHER = (0.0,) * 4, (0.0,) * 8


def log_odds(confidence: float) -> float:
    """Log-odds of a probability, kept within -4 and 6, in thirds."""
    if confidence <= 0.0180:
        return -4.0 / 3.0
    if confidence >= 0.9975:
        return 2.0
    return math.log(confidence / (1.0 - confidence)) / 3.0


def token_features(row: list[float]) -> Token:
    """Describe a drafted token by its signals: log-odds, entropy, log margin, n-gram agreement and disagreement."""
    margin, n = row[MARGIN], row[NGRAM]
    return (
        log_odds(row[CONFIDENCE]),
        0.25 * row[ENTROPY],
        0.5 * math.log1p(margin) if margin > 0.0 else 0.0,
        0.5 + 0.125 * n if n > 0.0 else 0.0,
        0.5 - 0.125 * n if n < 0.0 else 0.0,
    )


def start_features(context: Context) -> list[float]:
    """Describe the context of a step: acceptance, whether all was accepted last, lagged log-odds and entropy.

    While nothing is drafted all but the second fade towards neutral values.
    """
    whole = 1.0 if 0 < context.last_drafted == context.last_accepted else 0.0
    acceptance, odds, entropy = 2.0 * context.acceptance - 1.0, log_odds(context.mean_confidence), context.mean_entropy
    if not context.idle:
        return [acceptance, whole, odds, 0.25 * entropy]
    f = FADE**context.idle
    return [f * acceptance, whole, f * odds, 0.5 + f * (0.25 * entropy - 0.5)]


def before_features(start: list[float], previous: Token | None, j: int, seen: tuple[float, ...]) -> list[float]:
    """Features of the j-th token (from 0) before it is drafted.

    ``previous`` describes the one before it, ``seen`` what :class:`~policies.token_history.TokenHistory` knows.
    """
    acceptance, whole, odds, entropy = start
    if previous is None:
        return [1.0, odds, entropy, 0.0, 0.0, 0.0, acceptance, whole, 0.0, 1.0, *seen]
    return [1.0, *previous, acceptance, whole, j * 0.125 if j < 8 else 1.0, 0.0, *seen]


def after_features(start: list[float], own: Token, previous: Token | None, j: int) -> list[float]:
    """Features of the j-th token (from 0) once it is drafted.

    What the draft's own signals tell depends on whether an n-gram lookup proposes the same token, another, or none, so
    each of the first two cases has weights of its own beside the common ones.
    """
    odds, entropy, margin, agree, differ = own
    acceptance, whole, lagged, _ = start
    last, first = (lagged, whole) if previous is None else (previous[0], 0.0)
    at = j * 0.125 if j < 8 else 1.0
    # One list at once: this is asked for every token.
    if agree:
        return [1.0, odds, entropy, margin, acceptance, last, at, first, 1.0, agree, odds, entropy, *_OTHER]
    if differ:
        return [1.0, odds, entropy, margin, acceptance, last, at, first, *_OTHER, 1.0, differ, odds, entropy]
    return [1.0, odds, entropy, margin, acceptance, last, at, first, *_NEITHER]


class Step:
    """A step under way, described as far as it has got; what a policy keeps as ``Decision.features``.

    Attributes
    ----------
    before, after : list of list of float
        Features of the tokens so far, before and after they were drafted; empty for a lookup's, whose chance
        the drafter tells.
    survival : list of float
        Estimated chance that all of the first k tokens are accepted, k = 0, 1, ...
    level : str
        The context's compression level.
    tails : list of tuple of int
        The last tokens, up to four, that each token follows; empty tuples where they are not known.
    places : list
        Where the history of each token that took a forward is kept, see :func:`~policies.token_history.place`.
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
        "_after",
        "_before",
        "_context",
        "_hazard",
        "_memory",
        "_number",
        "_start",
        "_tokens",
        "after",
        "before",
        "expected",
        "forwards",
        "left",
        "level",
        "places",
        "rule",
        "survival",
        "tails",
    )

    def __init__(self, context: Context, hazard: Hazard) -> None:
        self._context, self._number, self._hazard = context, context.step, hazard
        # Copies of a policy may share a context, each with acceptances of its own.
        self._memory = context.memory.setdefault(hazard.history, {})
        self.level, self._start = context.level, start_features(context)
        self._before, self._after = hazard.weights(context.level)
        self.before: list[list[float]] = []
        self.after: list[list[float]] = []
        self.survival = [1.0]
        self.expected = 1.0
        self.forwards, self.left = 0, context.remaining - 1
        self._tokens: list[Token] = []
        self.tails: list[Tail] = [tuple(context.tokens[-TAIL:])]
        self.places: list[Place | None] = []
        self.rule: Any = None

    def sure(self) -> float:
        """How sure the drafter is of the next token if that takes no forward of a model, else 0."""
        context = self._context
        lookups = context.lookups
        if not lookups:
            return 0.0
        j = len(self._tokens)
        return lookups[j] if j < len(lookups) and context.step == self._number else 0.0

    def offer(self) -> float:
        """How sure the drafter is of the lookup that the next token could be instead, 0 if there is none."""
        context = self._context
        return context.offer if context.offer and context.step == self._number else 0.0

    def chance(self) -> float:
        """Chance that the next token, which takes a forward, is accepted if those before it are."""
        if len(self.before) == len(self._tokens):
            self._look()
        return probability(self._before, self.before[-1])

    def _look(self) -> None:
        """Describe the next token, which is not described yet, before it is drafted."""
        j, here = len(self._tokens), place(self.tails[-1])
        self.places.append(here)
        seen = self._hazard.history.look(self._memory, here)
        self.before.append(before_features(self._start, self._tokens[-1] if j else None, j, seen))

    def extend(self, drafted: int, signals: np.ndarray) -> None:
        """Take in the signals of the first ``drafted`` tokens, and their ids while the context has them."""
        tokens, context = self._tokens, self._context
        if len(tokens) == drafted:
            return
        drafts, lookups = (context.drafts, context.lookups) if context.step == self._number else ((), ())
        for j in range(len(tokens), drafted):
            own, chance = token_features(signals[j].tolist()), lookups[j] if j < len(lookups) else 0.0
            if chance:
                self.before[j:] = self.after[j:] = [[]]
                self.places[j:] = [None]
            else:
                if len(self.before) == j:
                    self._look()
                features = after_features(self._start, own, tokens[j - 1] if j else None, j)
                self.after.append(features)
                chance = probability(self._after, features)
                self.forwards += 1
            tokens.append(own)
            survival = self.survival[j] * chance
            self.survival.append(survival)
            self.expected += survival
            tail = self.tails[j]
            self.tails.append((*tail[1 - TAIL :], drafts[j]) if tail and j < len(drafts) else ())

    def note(self, tested: int, accepted: int) -> None:
        """Note in the history which of the tested tokens were accepted."""
        for j, where in enumerate(self.places[:tested]):
            if where is not None:
                self._hazard.history.note(self._memory, where, j < accepted)


def probability(weights: list[float], features: list[float]) -> float:
    """Logistic regression's probability, of 16 features: written out, as this is asked twice for every token."""
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, va, vb, vc, vd, ve, vf = weights
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, xa, xb, xc, xd, xe, xf = features
    eta = v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3 + v4 * x4 + v5 * x5 + v6 * x6 + v7 * x7
    eta = eta + v8 * x8 + v9 * x9 + va * xa + vb * xb + vc * xc + vd * xd + ve * xe + vf * xf
    if eta > 30.0:
        return 1.0
    return 1.0 / (1.0 + math.exp(-eta)) if eta > -30.0 else 0.0
