"""Draft signals, and the causal context that the decoder and the simulator build from them in the same way."""

from __future__ import annotations

from math import isfinite

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, Context, Outcome

#: Weight of the latest step in the sequence's exponentially weighted acceptance.
ACCEPTANCE_WEIGHT = 0.2


class History:
    """Turns the outcomes of earlier steps into the :class:`~policies.base.Context` of the next one.

    Parameters
    ----------
    level, task : str
        Compression level of the target and task label of the prompt.
    prompt_length : int
        Tokens in the target's context before anything was produced.
    """

    def __init__(self, level: str, task: str = "", prompt_length: int = 0) -> None:
        self.context = Context(level=level, task=task, context_length=prompt_length)

    def update(self, outcome: Outcome) -> None:
        """Advance the context past a step."""
        c, s = self.context, outcome.signals
        c.step += 1
        c.position += outcome.produced
        c.context_length += outcome.produced
        c.last_drafted, c.last_accepted = outcome.drafted, outcome.accepted
        if outcome.tested:
            c.acceptance += ACCEPTANCE_WEIGHT * (outcome.accepted / outcome.tested - c.acceptance)
        c.idle += 1
        if outcome.drafted:
            c.idle = 0
            found = summarise(s)
            if isfinite(sum(found)):  # what is no number would stay until the next draft, and spoil each decision
                c.mean_entropy, c.max_entropy, c.mean_confidence, c.min_confidence = found


def summarise(signals: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean entropy, max entropy, mean confidence and min confidence of drafted tokens (zeros for none)."""
    if not len(signals):
        return 0.0, 0.0, 0.0, 0.0
    # Python floats on a handful of rows are faster here than four numpy reductions.
    columns, n = signals.T.tolist(), len(signals)
    entropy, confidence = columns[ENTROPY], columns[CONFIDENCE]
    if n == 1:
        return entropy[0], entropy[0], confidence[0], confidence[0]
    return sum(entropy) / n, max(entropy), sum(confidence) / n, min(confidence)
