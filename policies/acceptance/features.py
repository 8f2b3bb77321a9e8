"""What is known of a step token by token, before and after each is drafted, as rows of two regressions."""

from __future__ import annotations

from math import log, log1p

import numpy as np

from policies.acceptance.context_table import FEATURES, Place
from policies.base import CONFIDENCE, ENTROPY, FADE, MARGIN, NGRAM, Context

#: Numbers of features before and after a token is drafted, MLP16's hidden layer left out.
BEFORE, OWN = 10 + FEATURES, 16

Token = tuple[float, float, float, float, float]
#: A token that took a forward: how many came before it, where its history is kept, the estimated chance that it is
#: accepted if those before it are, and NUMBERS that describe it: those of the token before it (of a step's first one,
#: the lagged ones), the step's acceptance and whether all was accepted last, its own, what its history tells
#: (:data:`~policies.acceptance.context_table.Seen`), again how many came before it, and what MLP16 reads of the step's
#: tokens up to it: mean entropy and confidence, greatest entropy and least confidence.
Asked = tuple[int, Place, float, tuple[float, ...]]
NUMBERS = 20


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
    found = np.zeros((2, len(numbers), OWN))
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
