"""The sums that a level's costs are estimated from, all of them in one vector.

By width, in rows: count, sum of seconds, of context, of its square, of their product. Then of the draft: count, k,
k squared, d, k d. Of the rest: count, t_0, tokens, seconds. Of catching up: tokens, seconds. Last, drafted tokens that
took no forward.
"""

from __future__ import annotations

import numpy as np

from policies.base import PolicyError, State
from policies.costs.prior import VAGUE, WIDTHS, CostPrior
from policies.estimators.bayesian_linear import check_array

#: Sums that are not by width, all sums, and where in those the draft's and the reading's begin.
SUMS, OF_DRAFT = 12, 5 * WIDTHS
ALL, OF_READING = OF_DRAFT + SUMS, OF_DRAFT + 9
#: How many times as fast as times the rate lambda is forgotten: it follows the texts and the draft, not the machine.
RATE = 4


def faded(keep: float) -> np.ndarray:
    """What is kept of all sums where ``keep`` is kept of times, shape (ALL,)."""
    found = np.full(ALL, keep)
    found[OF_DRAFT + 7 : OF_READING] = keep**RATE
    return found


def parts(total: np.ndarray) -> State:
    """All sums as they are saved and handed out."""
    return {"widths": total[:OF_DRAFT].reshape(5, WIDTHS), "sums": total[OF_DRAFT:]}


def whole(state: State) -> np.ndarray:
    """All sums of a state or delta; those of versions that knew nothing of catching up, or of lookups, are shorter."""
    lacks = next((n for n in (1, 3) if np.shape(state.get("sums", ())) == (SUMS - n,)), 0)
    sums = check_array(state, "sums", (SUMS - lacks,))
    return np.concatenate((check_array(state, "widths", (5, WIDTHS)).ravel(), sums, np.zeros(lacks)))


def saved(state: State) -> tuple[np.ndarray, list[float], CostPrior]:
    """Return a level's sums, its six numbers beside them, and its prior, of a state that may be an older version's."""
    older = np.shape(state.get("misc", ())) == (3,)  # of versions that knew nothing of the pace
    misc = check_array(state, "misc", (3 if older else 6,)).tolist()
    misc += [1.0, 1.0, 0.0] if older else []
    total = whole(state)
    # Older states lack the one or both.
    more = [float(check_array(state, name, ())) if name in state else 0.0 for name in ("catch_up", "first")]
    p = check_array(state, "prior", (max(len(np.atleast_1d(state.get("prior", 0.0))), 6),)).tolist()
    if min(misc[3:5]) <= 0.0 or misc[5] < 0.0:
        raise PolicyError(f"the state's pace must be two numbers above zero and a count, got {misc[3:]}")
    return total, misc, VAGUE if misc[2] else CostPrior(p[0], tuple(p[5:]), *p[1:5], *more)


def solve(m: tuple[float, ...], r: tuple[float, float, float]) -> tuple[float, float, float]:
    """Solve a symmetric 3 x 3 system, its upper triangle given by rows: quicker than numpy at this size."""
    m00, m01, m02, m11, m12, m22 = m
    f, g = m01 / m00, m02 / m00
    d11, d12, d22 = m11 - f * m01, m12 - f * m02, m22 - g * m02
    r1, r2 = r[1] - f * r[0], r[2] - g * r[0]
    h = d12 / d11
    z = (r2 - h * r1) / (d22 - h * d12)
    y = (r1 - d12 * z) / d11
    return (r[0] - m01 * y - m02 * z) / m00, y, z


def rescale(sums: np.ndarray, target: float, draft: float) -> None:
    """Multiply the times in sums: those of the target and of the step, and those of the draft."""
    sums[WIDTHS : 2 * WIDTHS] *= target
    sums[4 * WIDTHS : 5 * WIDTHS] *= target
    sums[[OF_DRAFT + 6, OF_DRAFT + 8]] *= target
    sums[[OF_DRAFT + 3, OF_DRAFT + 4, OF_DRAFT + 10]] *= draft
