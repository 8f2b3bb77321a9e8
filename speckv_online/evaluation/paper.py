"""The published evaluation of SpecKV (arXiv 2605.02888), as it was done, on its released records.

It splits by row, fits the predictor again on all rows, test rows included, and lets that predictor score the choices
that it made itself. So what it calls tokens per step is what the predictor expects, not what was decoded. Kept to the
letter here so that the published digits come out; the realised figures beside them are what was decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from policies.acceptance.mlp16 import level_code
from speckv_online.errors import UserError
from speckv_online.evaluation.estimators import compare_estimators, error_and_correlation, estimators, fit_quietly
from speckv_online.evaluation.published import (
    GAMMAS,
    LEVELS,
    POLICIES,
    PUBLISHED,
    PUBLISHED_MILLISECONDS,
    RECOMPUTED,
    TASKS,
)
from speckv_online.evaluation.release_runs import Run, best_gamma_by_task, goodput
from speckv_online.evaluation.release_steps import LAGGED, StepRow, column
from speckv_online.io.tables import Table
from speckv_online.training.mlp16 import Data

#: MLP16's inputs, in its order.
INPUTS = ("mean entropy", "mean confidence", "max entropy", "min confidence", "compression", "gamma")


@dataclass(frozen=True)
class Check:
    """One figure: what was stated, with its digits, and what came out here."""

    figure: str
    source: str
    stated: str
    value: float

    @property
    def reproduced(self) -> str:
        """The value, rounded to the digits of the stated figure."""
        digits = max(0, -int(Decimal(self.stated).as_tuple().exponent))
        return f"{self.value + 0.0:.{digits}f}"

    @property
    def same(self) -> bool:
        """True if every stated digit came out."""
        return Decimal(self.reproduced) == Decimal(self.stated)


def paper_protocol(
    rows: Sequence[StepRow], runs: Sequence[Run], say: Callable[[str], object] = print
) -> tuple[list[Check], list[Table]]:
    """Reproduce the published evaluation.

    Parameters
    ----------
    rows : sequence of StepRow
        The released step records, see :func:`speckv_online.evaluation.release_steps.read_rows`.
    runs : sequence of Run
        The released experiments, the source of seconds and of the task oracle.
    say : callable
        Told what is being done, for a log.

    Returns
    -------
    checks : list of Check
        Every figure that was stated beside what came out.
    tables : list of Table

    Raises
    ------
    UserError
        If scikit-learn is missing, or the records are not those of the release's grid of levels, tasks and gammas.
    """
    makers = estimators()
    _same_grid(rows, runs)
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import train_test_split

    found: dict[str, float] = {"records": len(rows)}
    data = released_data(rows)
    x, y = data.x, data.y
    strata = [f"{level}_{task}" for level, task in zip(data.level, data.task, strict=True)]
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=42, stratify=strata)
    found |= {"train records": len(train), "test records": len(test)}

    say("fitting five predictors to the training rows")
    scores = compare_estimators((x[train], y[train]), (x[test], y[test]), GAMMAS)
    by_name = {score.model: score for score in scores}
    found["test MSE, MLP-16"] = by_name["MLP-16"].mse
    found["test correlation, MLP-16"] = by_name["MLP-16"].correlation
    for name in ("test correlation, RF-100", "test correlation, RF-100, to three digits"):
        found[name] = by_name["RF-100"].correlation

    say("fitting MLP-16 and RF-100 again, to all rows, and letting them score their own choices")
    expected = {name: _expected(fit_quietly(makers[name](), x, y), x[test]) for name in ("MLP-16", "RF-100")}
    choice = expected["MLP-16"].argmax(1)
    policies = _policies(expected, data[test], rows, runs)
    tables = [*_policy_tables(policies, data[test], found), *_intervals(policies, found)]
    share = Table(
        "gamma_share", "Gammas that MLP-16 chooses on the test rows, share by level", ("level", "gamma", "share")
    )
    for level in LEVELS:
        here = choice[data.level[test] == level]
        for i, gamma in enumerate(GAMMAS):
            share.add(level, gamma, float(np.mean(here == i)))
    found["share of gamma 8 among MLP-16's choices, %"] = 100 * float(np.mean(choice == GAMMAS.index(8)))

    say("importances and correlations")
    forest = RandomForestClassifier(100, random_state=42).fit(x, y > 0.5)
    for name, value in zip(INPUTS, forest.feature_importances_, strict=True):
        found[f"Gini importance, {name}"] = float(value)
    found["correlation of mean entropy with acceptance"] = error_and_correlation(x[:, 0], y)[1]
    _held_out(makers["MLP-16"], data, rows, found)
    _realised(rows, runs, found)

    cost = Table(
        "estimators",
        "Predictors on the test rows, before the refit (milliseconds measured on this machine)",
        ("model", "MSE", "correlation", "ms per decision", "ms published"),
        [[s.model, s.mse, s.correlation, s.milliseconds, PUBLISHED_MILLISECONDS.get(s.model)] for s in scores],
        digits=4,
    )
    checks = [Check(name, "published", text, found[name]) for name, text in PUBLISHED.items()]
    checks += [Check(name, "recomputed", text, found[name]) for name, text in RECOMPUTED.items()]
    return checks, [checks_table(checks), *tables, share, cost]


def released_data(rows: Sequence[StepRow], lagged: bool = False) -> Data:
    """Return inputs and labels as the release has them: the gamma that was asked for, and its own acceptance rate.

    The last steps of a run drafted fewer tokens than gamma; the release's rate counts those, its gamma does not.
    """
    names = LAGGED if lagged else LAGGED.values()
    level, gamma = column(rows, "compression"), column(rows, "gamma")
    code = np.array([level_code(name) for name in level])
    x = np.column_stack([*(column(rows, name) for name in names), code, gamma]).astype(float)
    return Data(x, column(rows, "acceptance_rate"), column(rows, "prompt_id"), level, column(rows, "task"))


def checks_table(checks: Sequence[Check]) -> Table:
    """Return the figures side by side, and whether all stated digits came out."""
    table = Table(
        "figures",
        "Stated and reproduced. published: by the release; recomputed: derived earlier from its records",
        ("figure", "source", "stated", "reproduced", "same digits", "unrounded"),
        digits=5,
    )
    for c in checks:
        table.add(c.figure, c.source, c.stated, c.reproduced, "yes" if c.same else "NO", c.value)
    return table


def _same_grid(rows: Sequence[StepRow], runs: Sequence[Run]) -> None:
    wanted = {(level, task, gamma) for level in LEVELS for task in TASKS for gamma in GAMMAS}
    for name, items in (("step records", rows), ("experiments", runs)):
        cells = {(i.compression, i.task, i.gamma) for i in items}
        if cells != wanted:
            odd = ", ".join(map(str, sorted(cells ^ wanted)[0]))
            raise UserError(
                f"the {name} are not the release's: the cell ({odd}) is missing or extra; the paper protocol needs "
                f"levels {'/'.join(LEVELS)}, tasks {'/'.join(TASKS)} and gammas 2/4/6/8"
            )


def _expected(model: Any, x: np.ndarray) -> np.ndarray:
    """Expected tokens of every gamma, predicted rate * gamma + 1, shape (N, 4)."""
    columns = []
    for gamma in GAMMAS:
        x = x.copy()
        x[:, -1] = gamma
        columns.append(np.clip(model.predict(x), 0.0, 1.0) * gamma + 1)
    return np.stack(columns, axis=1)


def _policies(
    expected: dict[str, np.ndarray], test: Data, rows: Sequence[StepRow], runs: Sequence[Run]
) -> dict[str, np.ndarray]:
    """Expected tokens of each policy's gamma on every test row, scored by MLP-16 (RF-100's by itself)."""
    made, gamma, level = column(rows, "tokens_produced"), column(rows, "gamma"), column(rows, "compression")
    fixed = {a: max(GAMMAS, key=lambda g: made[(level == a) & (gamma == g)].mean()) for a in LEVELS}
    oracle, mlp, n = best_gamma_by_task(runs), expected["MLP-16"], np.arange(len(test))
    cells = list(zip(test.level.tolist(), test.task.tolist(), strict=True))
    chosen = (
        mlp[:, GAMMAS.index(4)],
        mlp[n, [GAMMAS.index(fixed[a]) for a, _ in cells]],
        mlp[n, [GAMMAS.index(oracle[cell]) for cell in cells]],
        mlp.max(1),
        expected["RF-100"].max(1),
    )
    return dict(zip(POLICIES, chosen, strict=True))


def _policy_tables(policies: dict[str, np.ndarray], test: Data, found: dict[str, float]) -> list[Table]:
    unit = "tokens/step that the predictor expects"
    by_level = Table("expected_tokens", f"Policies by level, in {unit}", ("level", *POLICIES))
    by_cell = Table(
        "improvement", f"MLP-16 against fixed-4, in {unit}", ("level", "task", "fixed-4", "MLP-16", "improvement %")
    )
    for level in (*LEVELS, "overall"):
        mask = test.level == level if level != "overall" else np.ones(len(test), dtype=bool)
        means = [float(policies[name][mask].mean()) for name in POLICIES]
        by_level.add(level, *means)
        found |= {f"expected tokens/step, {level}, {n}": m for n, m in zip(POLICIES, means, strict=True)}
    for level in LEVELS:
        for task in TASKS:
            mask = (test.level == level) & (test.task == task)
            four, ours = (float(policies[name][mask].mean()) for name in ("fixed-4", "MLP-16"))
            by_cell.add(level, task, four, ours, 100 * (ours / four - 1))
            stated = (("fixed-4", four), ("MLP-16", ours), ("improvement %", 100 * (ours / four - 1)))
            found |= {f"breakdown, {level} {task}, {name}": value for name, value in stated}
    return [by_level, by_cell]


def _intervals(policies: dict[str, np.ndarray], found: dict[str, float]) -> list[Table]:
    """Bootstrap over rows with the release's stream of random numbers: 5,000 means each, then 10,000 differences."""
    rng, n = np.random.RandomState(42), len(policies["MLP-16"])
    table = Table(
        "intervals", "95 % intervals of expected tokens/step over resampled rows", ("policy", "mean", "low", "high")
    )
    for name in POLICIES:
        means = np.sort([rng.choice(policies[name], size=n).mean() for _ in range(5000)])
        mean, low, high = float(policies[name].mean()), float(means[125]), float(means[4875])
        table.add(name, mean, low, high)
        for key, value in (("mean", mean), ("low", low), ("high", high)):
            found[f"interval over rows, {name}, {key}"] = value
    difference = policies["MLP-16"] - policies["fixed-4"]
    draws = np.array([rng.choice(difference, size=n).mean() for _ in range(10_000)])
    found["difference to fixed-4, tokens/step"] = float(difference.mean())
    found["p-value of the difference"] = float(np.mean(draws <= 0))
    found["improvement over fixed-4, %"] = 100 * float(policies["MLP-16"].mean() / policies["fixed-4"].mean() - 1)
    return [table]


def _held_out(make: Callable[[], Any], data: Data, rows: Sequence[StepRow], found: dict[str, float]) -> None:
    """Correlations of the same predictor where whole prompts (five folds, mean over them) or tasks are held out."""
    from sklearn.model_selection import GroupKFold

    everything, folds = np.arange(len(data)), [out for _, out in GroupKFold(5).split(data.x, groups=data.prompt)]

    def score(d: Data, parts: Sequence[np.ndarray], usable: np.ndarray = everything) -> float:
        each = []
        for part in parts:
            out, rest = np.intersect1d(usable, part), np.setdiff1d(usable, part)
            rate = np.clip(fit_quietly(make(), d.x[rest], d.y[rest]).predict(d.x[out]), 0.0, 1.0)
            each.append(error_and_correlation(rate, d.y[out])[1])
        return float(np.mean(each))

    # A prompt's first step has no earlier one: it is left out where the features are those of the step before.
    later = np.flatnonzero(column(rows, "step") > 0)
    found["correlation, whole prompts held out"] = score(data, folds)
    causal = released_data(rows, lagged=True)
    found["correlation, causal features, whole prompts held out"] = score(causal, folds, later)
    for task in TASKS:
        found[f"correlation, without {task}"] = score(data, [np.flatnonzero(data.task == task)])


def _realised(rows: Sequence[StepRow], runs: Sequence[Run], found: dict[str, float]) -> None:
    made, gamma = column(rows, "tokens_produced"), column(rows, "gamma")
    for g in GAMMAS:
        found[f"realised tokens/step, all levels, gamma {g}"] = float(made[gamma == g].mean())
    for level in LEVELS:
        speed = {g: goodput(r for r in runs if (r.compression, r.gamma) == (level, g)) for g in GAMMAS}
        found |= {f"realised tokens/s, {level}, gamma {g}": s for g, s in speed.items()}
        found[f"best fixed gamma by tokens/s, {level}"] = max(GAMMAS, key=lambda g: speed[g])
        found[f"always 8 against 4 in tokens/s, {level}, %"] = 100 * (speed[8] / speed[4] - 1)
