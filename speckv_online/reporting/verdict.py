"""Who won where, in one plain sentence that says no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from speckv_online.stats import Estimate

if TYPE_CHECKING:
    from speckv_online.reporting.rows import Row

BASELINE = "autoregressive"
#: With fewer prompts a bootstrap cannot tell a difference from chance, whatever its interval says.
ENOUGH = 5
#: Policies that learn, and those that are pretrained and learn nothing.
LEARNERS, PRETRAINED = ("online", "goodput"), ("mlp16:read=step", "mlp16")

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


def advice(rows: Sequence[Row], ratio: Ratio) -> list[str]:
    """Return, per level, one sentence that a reader can act on: what to use, what to avoid, or what is not settled.

    Parameters are those of :func:`verdict`.
    """
    levels = list(dict.fromkeys(row.level for row in rows))
    return [_advise(level, [row for row in rows if row.level == level], ratio) for level in levels]


def never_learns(policy: str, others: Sequence[str]) -> str:
    """Return by which of the other policies a learning one is judged, if any: its frozen copy, else MLP16."""
    name, _, options = policy.partition(":")
    if name not in LEARNERS or "learn=" in options:
        return ""
    frozen = [other for other in others if other.partition(":")[0] == name and "learn=none" in other]
    return next((other for other in (*frozen, *PRETRAINED) if other in others), "")


def learning(rows: Sequence[Row], ratio: Ratio) -> list[str]:
    """Answer in one sentence whether learning pays, for each policy that learns; parameters are those of
    :func:`verdict`."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        against = never_learns(row.policy, [other.policy for other in rows if other.level == row.level])
        gain = ratio(row.level, row.policy, against) if against else None
        if gain is not None:
            sure = "not sure" if row.prompts < ENOUGH else "yes" if gain.above else "no" if gain.below else "not sure"
            found.setdefault((row.policy, against), []).append(f"{row.level} {sure}, {_times(gain)}")
    return [
        f"Does learning pay? {policy} against {against}, which never learns: {'; '.join(parts)}."
        for (policy, against), parts in found.items()
    ]


def _advise(level: str, rows: Sequence[Row], ratio: Ratio) -> str:
    prompts = min(row.prompts for row in rows)
    if prompts < ENOUGH:
        few = "1 prompt is" if prompts == 1 else f"{prompts} prompts are"
        return f"{level}: {few} too few to choose by; run at least {ENOUGH}."
    best, tied = _leaders(level, rows, ratio)
    names = {row.policy: row for row in rows}
    if len(rows) == 1:
        return f"{level}: only {best.policy} ran; add other policies to compare it with."
    others = [row for row in tied if row.policy != BASELINE]
    if BASELINE not in names:
        also = f" (or {_join([row.policy for row in others])}: no clear difference)" if others else ""
        text = f"{level}: use {best.policy}{also}; add {BASELINE} to see whether drafting pays at all"
    elif best.policy == BASELINE and not tied:
        text = f"{level}: do not draft; every policy here is slower than {BASELINE} decoding"
    elif BASELINE in {row.policy for row in (best, *tied)}:
        text = f"{level}: no policy here is clearly faster than {BASELINE} decoding over {prompts} prompts"
        top = best if best.policy != BASELINE else others[0]
        s = top.speedup
        if s is not None:
            text += f" ({top.policy}: {_times(s)}); run more prompts before you rely on it"
    else:
        s, names_of_others = best.speedup, _join([row.policy for row in others]) if others else ""
        text = f"{level}: use {best.policy}" + (f", {_times(s)} {BASELINE}" if s else "")
        text += f" (or {names_of_others}: no clear difference)" if others else ""
    slow = [row for row in rows if row.speedup is not None and row.policy != BASELINE and row.speedup.below]
    if slow and not (best.policy == BASELINE and not tied):
        text += f"; avoid {_join([f'{row.policy} ({row.speedup.value:.2f} times)' for row in slow if row.speedup])}"
    return text + "."


def _times(s: Estimate) -> str:
    return f"{s.value:.2f} times [{s.low:.2f}, {s.high:.2f}]"


def _leaders(level: str, rows: Sequence[Row], ratio: Ratio) -> tuple[Row, list[Row]]:
    """Return the fastest policy, and those that are not clearly slower, fastest first."""
    ranked = sorted(rows, key=lambda row: row.tokens_per_second.value, reverse=True)
    best = ranked[0]
    ratios = [(row, ratio(level, best.policy, row.policy)) for row in ranked[1:]]
    return best, [row for row, found in ratios if found is None or not found.above]


def _level(level: str, rows: Sequence[Row], ratio: Ratio) -> str:
    best, tied = _leaders(level, rows, ratio)
    speed = f"{best.tokens_per_second.value:.1f} tokens/s"
    if len(rows) == 1:
        return f"at {level} only {best.policy} ran ({speed})"
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
