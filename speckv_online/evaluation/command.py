"""``speckv evaluate``: the published evaluation (arXiv 2605.02888), made again on its released records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speckv_online.console import say
from speckv_online.errors import UserError
from speckv_online.io.tables import finite


def evaluate(source: str | Path, *, experiment: str | Path | None = None, out: str | Path = "") -> dict[str, Any]:
    """Reproduce the published evaluation, and write its tables.

    Parameters
    ----------
    source : str or Path
        CSV of step records in the release's columns.
    experiment : str or Path, optional
        The release's experiment CSV; by default the file beside the records whose name has ``experiment`` for ``step``.
    out : str or Path
        Directory of the results; by default ``runs/evaluate-paper``.

    Returns
    -------
    dict
        ``out``, ``report`` (paths), ``tables`` (name to rows), and ``same`` of ``stated`` figures that came out.

    Raises
    ------
    UserError
        If a file is missing or broken, or scikit-learn is not installed.
    """
    from speckv_online.evaluation.estimators import require_sklearn
    from speckv_online.evaluation.paper import paper_protocol
    from speckv_online.evaluation.release_runs import read_runs
    from speckv_online.evaluation.release_steps import read_rows
    from speckv_online.io.run_directory import check_writable
    from speckv_online.io.tables import write_tables

    require_sklearn()
    source, folder = Path(source), Path(out or "runs/evaluate-paper").expanduser()
    if source.is_dir():
        raise UserError(f"{source} is a directory: give the release's CSV of step records")
    # Before minutes of work; the directory itself is made once there is something to put into it.
    check_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    checks, tables = paper_protocol(read_rows(source), read_runs(experiment or _beside(source)), say)
    check_writable(folder)
    notes = [
        "Expected tokens per step are what the predictor expects of its own choices, after it was fitted to the test "
        "rows too. Realised figures are labelled so. Intervals are over rows, as published."
    ]
    return {
        "out": str(folder),
        "report": str(write_tables(folder, tables, "The published evaluation", notes)),
        "tables": {t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables},
        "stated": len(checks),
        "same": sum(c.same for c in checks),
    }


def show(result: dict[str, Any], as_json: bool = False) -> None:
    """Print a result for people, or as one JSON object."""
    if as_json:
        print(json.dumps(finite(result)))
        return
    print(Path(result["report"]).read_text(encoding="utf-8").strip())
    print(f"\n{result['same']} of {result['stated']} stated figures came out to their last digit")
    print(f"tables: {result['out']}")


def _beside(source: Path) -> Path:
    """Return the release's experiment CSV that lies beside its step records."""
    path = source.with_name(source.name.replace("step", "experiment"))
    if path == source or not path.is_file():
        raise UserError(f"give the release's experiment CSV with --experiment: there is none beside {source}")
    return path


def add_arguments(parser: Any) -> None:
    """Declare the flags of ``speckv evaluate``."""
    parser.add_argument("source", metavar="RECORDS", help="CSV of step records of the release")
    parser.add_argument("--protocol", choices=("paper",), default="paper", help="as published (the only one)")
    parser.add_argument("--experiment", metavar="CSV", help="the release's experiments (default: beside RECORDS)")
    parser.add_argument("--out", default="", metavar="DIR", help="where results go (default: runs/evaluate-paper)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Any) -> None:
    """Run ``speckv evaluate`` from parsed flags."""
    show(evaluate(arguments.source, experiment=arguments.experiment, out=arguments.out), arguments.json)
