"""Who won where, in one plain sentence that says no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from speckv_online.stats import Estimate

if TYPE_CHECKING:
    from speckv_online.report import Row

BASELINE = "autoregressive"
#: With fewer prompts a bootstrap cannot tell a difference from chance, whatever its interval says.
ENOUGH = 5

#: (level, policy, other policy) -> ratio of their goodputs, paired by prompt; None if they share no prompt.
Ratio: TypeAlias = Callable[[str, str, str], Estimate | None]


def verdict(rows: Sequence[Row], ratio: Ratio) -> str:
    """Return one sentence on which policy had the highest goodput at each level.

    Parameters
    ----------
    rows : sequence of Row
        One per level and policy.
    ratio : callable
        See :data:`Ratio`. A policy counts as slower than the fastest only if the whole interval of their ratio says so.
    """
    levels = list(dict.fromkeys(row.level for row in rows))
    parts = [_level(level, [row for row in rows if row.level == level], ratio) for level in levels]
    sentence = "; ".join(parts) + "."
    fewest = min(row.prompts for row in rows)
    if fewest < ENOUGH:
        sentence = f"on {fewest} prompt{'s' * (fewest > 1)}, too few to be sure: {sentence}"
    return sentence[0].upper() + sentence[1:]


def _level(level: str, rows: Sequence[Row], ratio: Ratio) -> str:
    ranked = sorted(rows, key=lambda row: row.tokens_per_second.value, reverse=True)
    best = ranked[0]
    speed = f"{best.tokens_per_second.value:.1f} tokens/s"
    if len(ranked) == 1:
        return f"at {level} only {best.policy} ran ({speed})"
    tied = []
    for row in ranked[1:]:
        found = ratio(level, best.policy, row.policy)
        if found is None or not found.above:
            tied.append(row)
    if tied:
        names = [best.policy, *(r.policy for r in tied)]
        text = f"at {level} there was no clear difference between {_join(names)} (up to {speed}"
    else:
        text = f"at {level} {best.policy} was fastest ({speed}"
    return text + _against_baseline(best, {r.policy for r in tied}) + ")"


def _against_baseline(best: Row, tied: set[str]) -> str:
    s = best.speedup
    if s is None or best.policy == BASELINE:
        return ""
    if BASELINE in tied:
        return f"; {best.policy} {s.value:.2f} times {BASELINE}, which may be chance"
    return f", {s.value:.2f} times {BASELINE}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
