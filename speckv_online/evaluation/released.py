"""Realised tokens per second from released records and their timings: what was decoded, not what a predictor expects.

In the release every prompt ran at every level with every gamma, and each run was timed. So a fixed gamma's speed is a
plain quotient, and one chosen per task or level can be scored on prompts that did not choose it. A policy that changes
gamma within a run was never run; its speed is estimated from the steps whose recorded gamma is the one that it would
have chosen (replay by matching; Li et al., *Unbiased offline evaluation of contextual-bandit-based news article
recommendation algorithms*, WSDM 2011), each step weighed by the inverse share of its gamma, with its run's mean
seconds per step. It is labelled ``matched``, and is no more than an indication: gamma was fixed over each run instead
of drawn at random, so a step's lagged signals, taken under the same gamma, tell something of it, and contexts are
those of the recorded runs. Only traces replay such a policy exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from speckv_online.errors import UserError
from speckv_online.evaluation.policies import Realised
from speckv_online.evaluation.predictors import HeldOut
from speckv_online.evaluation.release_runs import Run, best_gamma_by_task, goodput
from speckv_online.training.mlp16 import Data
from speckv_online.training.step_table import StepRow, column


def fixed_policies(runs: Sequence[Run]) -> list[Realised]:
    """Return every fixed gamma, and gammas chosen per level or task: on other prompts, and in hindsight."""
    found = []
    oracle = best_gamma_by_task(runs)
    for level in dict.fromkeys(r.compression for r in runs):
        here = [r for r in runs if r.compression == level]
        gammas = sorted({r.gamma for r in here})
        for gamma in gammas:
            found.append(_chosen(level, f"fixed:{gamma}", "policy", here, {r.prompt_id: gamma for r in here}))
        best = _best(here)
        found.append(_chosen(level, "best fixed", "hindsight", here, {r.prompt_id: best for r in here}))
        by_task = {r.prompt_id: oracle[level, r.task] for r in here}
        found.append(_chosen(level, "best per task", "hindsight", here, by_task))
        if len({r.prompt_id for r in here}) > 1:
            others = {r.prompt_id: _best([o for o in here if o.prompt_id != r.prompt_id]) for r in here}
            found.append(_chosen(level, "best fixed, chosen on other prompts", "policy", here, others))
        same = {r.prompt_id: [o for o in here if o.task == r.task and o.prompt_id != r.prompt_id] for r in here}
        if all(same.values()):
            choice = {prompt: _best(rest) for prompt, rest in same.items()}
            found.append(_chosen(level, "best per task, chosen on other prompts", "policy", here, choice))
    return found


def _best(runs: Sequence[Run]) -> int:
    return max(sorted({r.gamma for r in runs}), key=lambda g: goodput(r for r in runs if r.gamma == g))


def _chosen(level: str, name: str, kind: str, runs: Sequence[Run], gamma: Mapping[str, int]) -> Realised:
    found = Realised(level, name, kind)
    for run in runs:
        if run.gamma == gamma[run.prompt_id]:
            found.add(run.prompt_id, run.num_tokens, run.elapsed_sec, {run.gamma: run.num_steps})
    return found


def step_seconds(rows: Sequence[StepRow], runs: Sequence[Run]) -> np.ndarray:
    """Return the mean seconds per step of each row's run, shape (rows,).

    Raises
    ------
    UserError
        If the experiments do not cover the steps.
    """
    mean = {(r.compression, r.gamma, r.prompt_id): r.elapsed_sec / r.num_steps for r in runs}
    counts = Counter((r.compression, r.gamma, r.prompt_id) for r in rows)
    for run in runs:
        steps = counts.get((run.compression, run.gamma, run.prompt_id), 0)
        if steps != run.num_steps:
            raise UserError(
                f"the experiment {run.compression}, gamma {run.gamma}, {run.prompt_id} has {run.num_steps} steps, "
                f"the step records have {steps}: give the two files of one release"
            )
    missing = [key for key in counts if key not in mean]
    if missing:
        raise UserError(f"no experiment for the steps of {missing[0]}: give the two files of one release")
    return np.array([mean[r.compression, r.gamma, r.prompt_id] for r in rows])


def matched_policies(
    rows: Sequence[StepRow], runs: Sequence[Run], data: Mapping[str, Data], fits: Mapping[str, Mapping[str, HeldOut]]
) -> list[Realised]:
    """Return MLP16's policies, trained without the prompts that they are scored on, by matching steps.

    Parameters
    ----------
    rows : sequence of StepRow
        All of them drafted something.
    runs : sequence of Run
    data, fits : mapping by features
        Data of the rows in their order, and the fits without each part, see
        :func:`speckv_online.evaluation.predictors.cross_fit`.
    """
    seconds, level, gamma = step_seconds(rows, runs), column(rows, "compression"), column(rows, "gamma")
    gammas = np.unique(gamma)
    found = []
    for features, split, timed, name in (
        ("step-mean", "prompts", False, "MLP16 as published (signals of the step itself)"),
        ("causal", "prompts", False, "MLP16 causal, tokens/step"),
        ("causal", "prompts", True, "MLP16 causal, tokens/s"),
        ("causal", "task", True, "MLP16 causal, tokens/s, task held out"),
        ("causal", "level", True, "MLP16 causal, tokens/s, level held out"),
    ):
        choice = np.full(len(rows), -1)
        parts = [held for key, held in fits[features].items() if key.split(" ")[0] == split]
        for out, weights in (fit for held in parts for fit in held.fits):
            x = data[features].x
            tokens = np.empty((len(rows), len(gammas)))
            for i, g in enumerate(gammas):
                tokens[:, i] = 1 + g * weights.predict(np.c_[x[:, :-1], np.full(len(x), g)])
            for a in np.unique(level[out]):
                here = level == a
                # A level's seconds may be known even where no prompt of it taught acceptance: they need no labels.
                known = here & ~out if (here & ~out).any() else here
                ran = np.isin(gammas, gamma[known])  # a level may lack a gamma that another one has
                cost = np.array([seconds[known & (gamma == g)].mean() for g in gammas[ran]])
                price = dinkelbach(tokens[known][:, ran], cost) * cost if timed else 0.0
                choice[here & out] = gammas[ran][(tokens[here & out][:, ran] - price).argmax(1)]
        if parts:
            found += _match(name, rows, choice, seconds)
    return found


def dinkelbach(tokens: np.ndarray, cost: np.ndarray) -> float:
    """Return the best Σtokens/Σseconds of a gamma per step: ``tokens`` (N, K) expected, ``cost`` (K,) seconds."""
    rate = 0.0
    while True:
        best = (tokens - rate * cost).argmax(1)
        new = float(tokens[np.arange(len(tokens)), best].sum() / cost[best].sum())
        if new <= rate * (1 + 1e-12):
            return rate
        rate = new


def _match(name: str, rows: Sequence[StepRow], choice: np.ndarray, seconds: np.ndarray) -> list[Realised]:
    total = Counter((r.compression, r.gamma) for r in rows)
    found = {a: Realised(a, name, "matched") for a in dict.fromkeys(r.compression for r in rows)}
    for row, chosen, second in zip(rows, choice, seconds, strict=True):
        if chosen < 0:
            continue
        weight = 1.0 / total[row.compression, row.gamma]
        if chosen == row.gamma:
            found[row.compression].add(row.prompt_id, weight * row.tokens_produced, weight * second)
        shares = found[row.compression].gammas
        shares[int(chosen)] = shares.get(int(chosen), 0.0) + 1
    return list(found.values())
