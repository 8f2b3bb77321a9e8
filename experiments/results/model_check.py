"""Whole calls by the cost model, for :mod:`experiments.results.tables`: does it predict what the clock then says?

The seconds of a call are taken to be those of its steps, ``T(k)`` for k drafted tokens (the draft's ``t_d k``, the
verification's ``T_v(k + 1)`` and the overhead in one) with a slope in the context, and of reading the prompt, by the
target and, at its first draft, by the draft: a constant and a slope in the prompt's length each. These numbers are
means, since a goodput holds the machine's stalls too. They are fitted by least squares to the contenders of fixed gamma
in the same run, and for every prompt to the *other* prompts only; then every contender's calls are predicted from the
gammas and contexts of its steps. A token that was drafted and not submitted is charged the mean draft seconds of one
forward of the same calls. So nothing of what is predicted is in the fit: no call of a policy that is not fixed, and no
call with the same prompt. The other prompts are those that the contender decoded too, so that a drift of the machine
over the run is in both. A policy's own time is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from speckv_online.io.run_directory import UnitResult
from speckv_online.io.step_records import StepRecord

PLAIN = "autoregressive"
PROMPTS = 4  # three others are the least that a slope in the prompt's length can be fitted to
HUNDRED = 100.0  # contexts are counted in hundreds of tokens, which keeps the equations well scaled


def gamma_of(policy: str) -> int | None:
    """The gamma of a contender that never changes it, with the model drafter; None for all others."""
    name, _, gamma = policy.partition(":")
    if policy == PLAIN:
        return 0
    return int(gamma) if name == "fixed" and gamma.isdecimal() else None


def modelled_calls(units: Sequence[UnitResult]) -> dict[str, dict[str, float]]:
    """Return the modelled seconds of calls at one level, by contender and prompt.

    Parameters
    ----------
    units : sequence of UnitResult
        All calls of one level. Those without step records, or with another drafter than the model (``+`` in the name),
        are not modelled.

    Returns
    -------
    dict
        Empty where there is too little to fit: fewer than four prompts, or no contender of fixed gamma.
    """
    units = [u for u in units if u.steps and "+" not in u.unit.policy]
    knots = sorted({g for u in units if (g := gamma_of(u.unit.policy)) is not None})
    prompts = sorted({u.unit.prompt for u in units})
    if not knots or len(prompts) < PROMPTS:
        return {}
    size = len(knots) + 5
    lhs, rhs = np.zeros((len(prompts), size, size)), np.zeros((len(prompts), size))
    # Draft seconds and forwards, but for each call's first draft, which reads the prompt.
    drafts = np.zeros((len(prompts), 2))
    for u in units:
        if gamma_of(u.unit.policy) is not None:
            i = prompts.index(u.unit.prompt)
            for s in [s for s in u.steps if s.forwards][1:]:
                drafts[i] += s.draft_seconds, s.forwards
            for row, seconds in rows(u, knots):
                lhs[i] += np.outer(row, row)
                rhs[i] += row * seconds
    calls: dict[str, dict[str, UnitResult]] = {}
    for u in units:
        calls.setdefault(u.unit.policy, {})[u.unit.prompt] = u
    out: dict[str, dict[str, float]] = {}
    for policy, by_prompt in calls.items():
        for prompt, u in by_prompt.items():
            others = [i for i, p in enumerate(prompts) if p != prompt and p in by_prompt]
            if len(others) < PROMPTS - 1 or not lhs[others].any():
                continue
            costs = np.linalg.lstsq(lhs[others].sum(0), rhs[others].sum(0), rcond=None)[0]
            t_d, forwards = drafts[others].sum(0)
            dropped = sum(s.forwards - s.drafted for s in u.steps)
            seconds = sum(float(row @ costs) for row, _ in rows(u, knots)) + dropped * t_d / max(forwards, 1.0)
            out.setdefault(policy, {})[prompt] = max(seconds, 1e-6)  # a bad fit is no crash
    return out


def rows(unit: UnitResult, knots: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    """Yield (features, measured seconds) of a call's steps; the first holds all of the call that is not a later step.

    Features: one weight per knot of ``T``; the context; 1 and the prompt's length for the first step; 1 and the
    context's for the first one that drafts.
    """
    steps = unit.steps
    first_draft = next((i for i, s in enumerate(steps) if s.forwards), None)
    for i, step in enumerate(steps):
        context = step.context_length / HUNDRED
        row = np.concatenate((between(step, knots), np.zeros(5)))
        row[-5] = context
        if i == 0:
            row[-4:-2] = 1.0, context
        if i == first_draft:
            row[-2:] = 1.0, context
        later = sum(s.seconds for s in steps[1:]) if i == 0 else 0.0
        yield row, float(unit.facts["call_seconds"]) - later if i == 0 else step.seconds


def between(step: StepRecord, knots: Sequence[int]) -> np.ndarray:
    """Weights of the knots, shape (knots,), that make ``T`` linear between them and beyond the last one."""
    weights = np.zeros(len(knots))
    if len(knots) == 1:
        weights[0] = 1.0
        return weights
    j = int(np.clip(np.searchsorted(knots, step.drafted), 1, len(knots) - 1))
    share = (step.drafted - knots[j - 1]) / (knots[j] - knots[j - 1])
    weights[j - 1 : j + 1] = 1.0 - share, share
    return weights
