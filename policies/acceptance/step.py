"""The features of one step's tokens, as they are drafted."""

from __future__ import annotations

from math import exp
from typing import Any, Protocol, TypeAlias

from policies.acceptance.context_table import NOWHERE, TAIL, Place, Seen, TokenHistory, place
from policies.acceptance.features import Asked, Token, start_features, token_features
from policies.base import CONFIDENCE, ENTROPY, Context, Draft, Outcome

#: MLP16's hidden layer: the weights of its four inputs, by unit; by gamma, what level, gamma and bias add to each unit;
#: and the weight of each unit's output. Lists: numpy's code and data are not in the processor's cache after a forward.
Net: TypeAlias = tuple[list[tuple[float, float, float, float]], list[list[float]], list[float]]


class AcceptanceWeights(Protocol):
    """What a step needs of an acceptance model (:class:`policies.acceptance.model.AcceptanceModel`)."""

    history: TokenHistory

    def weights(self, level: str) -> tuple[list[float], list[float], Net]:
        """Return the weights in use at a level: before and after a token is drafted, and those of MLP16's hidden
        layer."""


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
    confidence : float
        How sure the drafter is of the next token if that is a lookup's proposal, 0 if it takes a forward.
    expected : float
        Tokens that the step produces on average if no more are drafted: the sum of ``survival``.
    rule : object
        What the policy decides the step by; its own affair.
    unread : bool
        Whether the policy spares the draft model the reading of the text: it is not asked then.
    """

    __slots__ = (
        "_acceptance",
        "_after",
        "_before",
        "_chance",
        "_confidence",
        "_entropy",
        "_ids",
        "_known",
        "_lagged",
        "_least",
        "_model",
        "_most",
        "_net",
        "_next",
        "_signals",
        "_tokens",
        "_whole",
        "asked",
        "confidence",
        "expected",
        "forwards",
        "left",
        "level",
        "memory",
        "rule",
        "survival",
        "unread",
    )

    def __init__(self, context: Context, acceptance_model: AcceptanceWeights) -> None:
        self._model = acceptance_model
        # Copies of a policy may share a context, each with acceptances of its own.
        self.memory = context.memory.setdefault(acceptance_model.history, {})
        self.level = context.level
        self._acceptance, self._whole, odds, entropy = start_features(context)
        self._lagged: Token = (odds, entropy, 0.0, 0.0, 0.0)
        self._before, self._after, self._net = acceptance_model.weights(context.level)
        self._entropy = self._confidence = self._most = 0.0
        self._least = 1.0
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
        self.confidence = context.lookup_confidence
        self.rule: Any = None
        self.unread = False

    def chance(self) -> float:
        """Chance that the next token, which takes a forward, is accepted if those before it are."""
        if self._next is not None:
            return self._chance
        j, ids, at = len(self._tokens), self._ids, self._known
        if at:
            at += j
            here = NOWHERE if at > len(ids) else place(ids[at - TAIL : at] if at > TAIL else ids[:at])
        else:
            here = NOWHERE
        seen = longest, one, two = self._model.history.look_up(self.memory, here)
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

    def extend(self, drafted: int, draft: Draft | Outcome) -> None:
        """Take in the first ``drafted`` tokens of a draft, or of what came of it."""
        tokens, lookups, signals = self._tokens, draft.lookups, draft.signals
        j = len(tokens)
        if j >= drafted:
            return
        ids, known = self._ids, self._known
        if known:
            ids += draft.tokens[len(ids) - known : drafted]
        self._signals, told = signals, len(lookups)
        survivals, survival, expected = self.survival, self.survival[j], self.expected
        table = signals.tolist()
        while j < drafted:
            chance = lookups[j] if j < told else 0.0
            if chance:
                tokens.append(None)
            else:
                if self._next is None:
                    self.chance()
                here, seen, previous = self._next  # type: ignore[misc]
                chance = self._describe(table[j], j, here, seen, previous)
            self._next = None
            survival *= chance
            survivals.append(survival)
            expected += survival
            j += 1
        self.expected = expected
        self.confidence = lookups[drafted] if drafted < told else 0.0

    def _describe(self, row: list[float], j: int, here: Place, seen: Seen, previous: Token) -> float:
        """Take in the j-th token (from 0), which took a forward; return the chance that it is accepted."""
        own = token_features(row)
        # What MLP16 reads of the step's tokens, this one with them.
        entropy, confidence = row[ENTROPY], row[CONFIDENCE]
        self.forwards = n = self.forwards + 1
        self._entropy += entropy
        self._confidence += confidence
        if entropy > self._most:
            self._most = entropy
        if confidence < self._least:
            self._least = confidence
        mean_entropy, mean_confidence, most, least = self._entropy / n, self._confidence / n, self._most, self._least
        # The sums over `rows`, zeros left out: this is asked for every token.
        w, (odds, entropy, margin, agree, differ), acceptance = self._after, own, self._acceptance
        eta = w[0] + w[1] * odds + w[2] * entropy + w[3] * margin + w[4] * acceptance + w[5] * previous[0]
        eta += w[6] * (j * 0.125 if j < 8 else 1.0) if j else w[7] * self._whole
        if agree:
            eta += w[8] + w[9] * agree + w[10] * odds + w[11] * entropy
        elif differ:
            eta += w[12] + w[13] * differ + w[14] * odds + w[15] * entropy
        units, rest, head = self._net
        for (a, b, c, d), unit, weight in zip(units, rest[j + 1], head, strict=True):
            unit += a * mean_entropy + b * mean_confidence + c * most + d * least
            if unit > 0.0:
                eta += weight * unit
        chance = 1.0 / (1.0 + exp(-eta)) if eta > -30.0 else 0.0
        self._tokens.append(own)
        about = (*previous, acceptance, self._whole, *own, *seen, float(j), mean_entropy, mean_confidence, most, least)
        self.asked.append((j, here, chance, about))
        return chance

    def note(self, labelled: int, accepted: int) -> None:
        """Note in the history which of the tested tokens were accepted."""
        for j, where, _, _ in self.asked:
            if j < labelled:
                self._model.history.note(self.memory, where, j < accepted)
