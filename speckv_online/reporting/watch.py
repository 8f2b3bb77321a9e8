"""`speckv watch`: tokens per second, acceptance and gamma shares of a run while it goes on."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from typing import Any

from speckv_online.errors import UserError
from speckv_online.io.run_directory import UnitResult
from speckv_online.reporting.progress import Progress
from speckv_online.reporting.series import GROUPS

#: Titles of the table; the last column holds the share of steps in percent by tokens drafted.
TITLES = (
    "level",
    "policy",
    "prompts",
    "tokens/s",
    "recent",
    "accepted",
    " ".join(f"{g:>3}" for g, _ in GROUPS) + " γ %",
)


def watch(path: str, *, once: bool = False, as_json: bool = False, interval: float = 2.0) -> None:
    """Show a run until it has finished.

    Parameters
    ----------
    path : str
        Run directory.
    once : bool
        Show what there is and return.
    as_json : bool
        Print one JSON object per line: each time that something is new, or once.
    interval : float
        Seconds between looks at the files.

    Raises
    ------
    UserError
        If there is no run.
    """
    if not 0 < interval <= 86400:
        raise UserError(f"--interval must be above zero and at most a day (86400), got {interval}")
    progress = Progress(path)
    with ExitStack() as stack:
        live = sys.stdout.isatty() and not (once or as_json)
        screen = stack.enter_context(_screen()) if live else None
        while True:
            fresh = progress.update()
            if screen is not None:
                screen.update(table(progress.snapshot()), refresh=True)
            elif once and not as_json:
                print("\n".join(text_lines(progress.snapshot())))
            elif as_json and (fresh or once):
                print(json.dumps(progress.snapshot()), flush=True)
            elif not as_json:
                for result in fresh:
                    print(line(result, progress), flush=True)
            if once or progress.finished:
                return
            time.sleep(interval)


def row_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of a snapshot as text, in the order of :data:`TITLES`."""
    return (
        row["level"],
        row["policy"],
        str(row["prompts"]) + (f"/{row['of']}" if row["of"] else ""),
        f"{row['tokens_per_second']:.2f}",
        f"{row['recent_tokens_per_second']:.2f}",
        "–" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
        " ".join(f"{100 * share:3.0f}" if share else "  ·" for share in row["gamma_share"].values()) + "    ",
    )


def text_lines(snapshot: dict[str, Any]) -> list[str]:
    """Return a snapshot's lines as plain text."""
    from speckv_online.reporting.report import text_table

    if not snapshot["rows"]:
        return [f"{snapshot['run']}: {snapshot['status']}, no prompt finished yet"]
    head = f"{snapshot['run']}: {snapshot['status']}, figures are measured"
    return [head, *text_table([TITLES, *map(row_cells, snapshot["rows"])])]


def line(result: UnitResult, progress: Progress) -> str:
    """Return a log line for a unit that has just been read."""
    unit = result.unit
    facts = progress.tallies[unit.level, unit.policy].facts()
    drafted = sum(s.drafted for s in result.steps)
    accepted = sum(s.accepted for s in result.steps)
    return (
        f"{unit.level} {unit.policy} on {unit.prompt}: {result.tokens / result.seconds:.1f} tokens/s, "
        f"accepted {accepted} of {drafted} drafted, mean γ {drafted / len(result.steps):.2f}; "
        f"so far {facts['tokens_per_second']:.1f} tokens/s over {facts['prompts']} prompts"
    )


def table(snapshot: dict[str, Any]) -> Any:
    """Return a snapshot as a table of rich."""
    from rich.table import Table

    made = Table(
        title=f"{snapshot['run']}: {snapshot['status']} (measured)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, title in enumerate(TITLES):
        made.add_column(title, justify="left" if i < 2 else "right", no_wrap=i != 1)
    for i, row in enumerate(snapshot["rows"]):
        last = i + 1 == len(snapshot["rows"]) or snapshot["rows"][i + 1]["level"] != row["level"]
        made.add_row(*row_cells(row), end_section=last)
    return made


def _screen() -> Any:
    from rich.live import Live

    return Live(auto_refresh=False)
