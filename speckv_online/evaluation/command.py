"""``speckv evaluate``: the published evaluation as it was, and an honest one.

``paper`` reproduces arXiv 2605.02888 on its released records. ``honest`` asks what a user would get: realised tokens
per second on prompts, tasks and levels that were held out, with features that exist when gamma is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speckv_online.console import say
from speckv_online.errors import UserError
from speckv_online.io.tables import Table, finite

PROTOCOLS = ("paper", "honest")


def evaluate(
    protocol: str,
    source: str | Path,
    *,
    experiment: str | Path | None = None,
    cost: str | Path | None = None,
    out: str | Path = "",
    seed: int = 0,
    resamples: int = 10_000,
    epochs: int = 100,
) -> dict[str, Any]:
    """Run an evaluation and write its tables and figures.

    Parameters
    ----------
    protocol : {'paper', 'honest'}
    source : str or Path
        CSV of step records in the release's columns, or a directory of traces (``honest``).
    experiment : str or Path, optional
        The release's experiment CSV; by default the file beside the records whose name has ``experiment`` for ``step``.
    cost : str or Path, optional
        Cost table of a replay; by default ``cost.json`` in the directory of traces.
    out : str or Path
        Directory of the results; by default ``runs/evaluate-PROTOCOL``.
    seed, resamples, epochs : int
        Of the honest protocol: bootstrap samples, and most passes when training. The paper protocol has its own.

    Returns
    -------
    dict
        ``out``, ``report`` (paths), ``tables`` (name to rows), and ``same``/``stated`` (figures) for ``paper``.

    Raises
    ------
    UserError
        If a file is missing or broken, or scikit-learn is not installed.
    """
    from speckv_online.evaluation.plots import draw
    from speckv_online.io.run_directory import check_writable
    from speckv_online.io.tables import write_tables
    from speckv_online.training.estimators import require_sklearn

    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol must be {' or '.join(PROTOCOLS)}, got {protocol!r}")
    if resamples < 100 or seed < 0 or epochs < 1:
        raise UserError("--resamples must be at least 100, --epochs at least 1 and --seed not negative")
    require_sklearn()
    source, folder = Path(source), Path(out or f"runs/evaluate-{protocol}").expanduser()
    result: dict[str, Any] = {"protocol": protocol, "out": str(folder)}
    if experiment and source.is_dir():
        raise UserError("--experiment goes with a CSV of step records, traces have none: leave it out")
    if cost and not source.is_dir():
        raise UserError("--cost goes with a directory of traces, records have their own seconds: leave it out")
    # Before an hour of work; the directory itself is made once there is something to put into it.
    check_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    if protocol == "paper":
        if source.is_dir():
            raise UserError(f"{source} is a directory: the paper protocol needs the release's CSV of step records")
        tables, notes = _paper(source, experiment, result)
    elif source.is_dir():
        tables, notes = _traces(source, cost, seed, resamples, epochs)
    else:
        tables, notes = _released(source, experiment, seed, resamples, epochs)
    check_writable(folder)
    say("drawing figures")
    figures = draw(tables, folder)
    heading = f"Evaluation, protocol {protocol}"
    pictures = [f"![{path.stem}]({path.name})" for path in figures]
    result["report"] = str(write_tables(folder, tables, heading, [*notes, *pictures]))
    result["tables"] = {t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables}
    return result


def show(result: dict[str, Any], as_json: bool = False) -> None:
    """Print a result for people, or as one JSON object."""
    if as_json:
        print(json.dumps(finite(result)))
        return
    print(Path(result["report"]).read_text(encoding="utf-8").split("\n![", 1)[0].strip())
    wanted = ("figures",) if result["protocol"] == "paper" else ("policies", "predictions")
    for name in wanted:
        rows = result["tables"][name]
        table = Table(name, name, list(rows[0]) if rows else [], [list(r.values()) for r in rows])
        print("\n" + table.markdown())
    if "stated" in result:
        print(f"{result['same']} of {result['stated']} stated figures came out to their last digit")
    print(f"tables and figures: {result['out']}")


def _paper(source: Path, experiment: str | Path | None, result: dict[str, Any]) -> tuple[list[Table], list[str]]:
    from speckv_online.evaluation.paper import paper_protocol
    from speckv_online.evaluation.release_runs import read_runs
    from speckv_online.training.step_table import read_rows

    rows = read_rows(source)
    runs = read_runs(experiment or _beside(source))
    checks, tables = paper_protocol(rows, runs, say)
    result |= {"stated": len(checks), "same": sum(c.same for c in checks)}
    notes = [
        "Expected tokens per step are what the predictor expects of its own choices, after it was fitted to the test "
        "rows too. Realised figures are labelled so. Intervals are over rows, as published."
    ]
    return tables, notes


def _released(
    source: Path, experiment: str | Path | None, seed: int, resamples: int, epochs: int
) -> tuple[list[Table], list[str]]:
    from speckv_online.evaluation.policies import policy_tables
    from speckv_online.evaluation.predictors import cross_fit, estimator_table, importance_table, prediction_tables
    from speckv_online.evaluation.release_runs import read_runs
    from speckv_online.evaluation.released import fixed_policies, matched_policies, step_seconds
    from speckv_online.evaluation.tables import acceptance_table, signal_table, speed_table
    from speckv_online.training.mlp16 import data_from_rows
    from speckv_online.training.step_table import read_rows

    rows, runs = read_rows(source), read_runs(experiment or _beside(source))
    step_seconds(rows, runs)  # that the two files belong together should show before an hour of training
    rows = [r for r in rows if r.drafted > 0]
    data = {features: data_from_rows(rows, features) for features in ("step-mean", "causal")}
    fits = {features: cross_fit(d, epochs, say) for features, d in data.items()}
    found = fixed_policies(runs) + matched_policies(rows, [r for r in runs if r.gamma > 0], data, fits)
    tasks = {r.prompt_id: r.task for r in rows}
    gammas = tuple(sorted({r.gamma for r in rows}))
    how = "measured in the release (matched: estimated from the steps whose gamma agrees)"
    tables = [*policy_tables(found, tasks, how, resamples), *prediction_tables(data, fits)]
    tables += [importance_table(data, fits, seed), estimator_table(data["causal"], gammas, seed)]
    tables += [speed_table(runs), acceptance_table(rows, runs), signal_table(rows)]
    return tables, [
        f"{len(rows)} steps of {len(tasks)} prompts. Speeds are the release's own timings; intervals are over prompts. "
        "`matched` is an indication only: gamma was fixed over each recorded run, not drawn at random."
    ]


def _traces(
    source: Path, cost: str | Path | None, seed: int, resamples: int, epochs: int
) -> tuple[list[Table], list[str]]:
    from speckv_online.evaluation import replayed
    from speckv_online.evaluation.policies import policy_tables
    from speckv_online.evaluation.predictors import cross_fit, estimator_table, importance_table, prediction_tables
    from speckv_online.evaluation.tables import acceptance_table, signal_table
    from speckv_online.simulate.cost_table import load_cost
    from speckv_online.traces.trace import load_traces
    from speckv_online.training.mlp16 import data_from_traces

    traces, costs = load_traces(source), load_cost(cost or source / "cost.json")
    for level in {t.level for t in traces}:
        costs.level(level)
    say(f"{len(traces)} traces; replaying them for rows to train on")
    data = {f: data_from_traces(traces, f, replayed.LABELLED, seed) for f in ("step-mean", "causal")}
    fits = {features: cross_fit(d, epochs, say) for features, d in data.items()}
    found = replayed.fixed_policies(traces, costs)
    found += replayed.fitted_policies(traces, costs, data["causal"], fits["causal"], seed, say)
    tasks = {t.prompt_id: t.task for t in traces}
    tables = policy_tables(found, tasks, f"modelled, cost table {costs.name}", resamples)
    tables += [*prediction_tables(data, fits), importance_table(data, fits, seed)]
    tables.append(estimator_table(data["causal"], replayed.LABELLED, seed))
    rows = replayed.steps_of(traces)
    tables += [replayed.speeds_by_gamma(traces, costs), acceptance_table(rows), signal_table(rows)]
    return tables, [
        f"{len(traces)} exact traces of {len(tasks)} prompts, cost table `{costs.name}` "
        f"({costs.source}). Tokens and steps are those of real decoding, seconds modelled; intervals are over prompts."
    ]


def _beside(source: Path) -> Path:
    """Return the release's experiment CSV that lies beside its step records."""
    path = source.with_name(source.name.replace("step", "experiment"))
    if path == source or not path.is_file():
        raise UserError(f"give the release's experiment CSV with --experiment: there is none beside {source}")
    return path


def add_arguments(parser: Any) -> None:
    """Declare the flags of ``speckv evaluate``."""
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True, help="as published, or honest")
    parser.add_argument("source", metavar="RECORDS", help="CSV of step records, or a directory of traces (honest)")
    parser.add_argument("--experiment", metavar="CSV", help="the release's experiments (default: beside RECORDS)")
    parser.add_argument("--cost", metavar="FILE", help="cost table for traces (default: cost.json beside them)")
    parser.add_argument("--out", default="", metavar="DIR", help="where results go (default: runs/evaluate-PROTOCOL)")
    parser.add_argument("--seed", type=int, default=0, help="seed of replays and samples (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="bootstrap samples (default: 10000)")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="most passes when training (default: 100)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Any) -> None:
    """Run ``speckv evaluate`` from parsed flags."""
    given: Sequence[str] = ("experiment", "cost", "out", "seed", "resamples", "epochs")
    result = evaluate(arguments.protocol, arguments.source, **{name: getattr(arguments, name) for name in given})
    show(result, arguments.json)
