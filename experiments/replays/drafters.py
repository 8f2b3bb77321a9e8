"""Replay policies on exact traces of several drafters: what choosing gamma is worth with each, and against all of them.

Traces are named PAIR/DRAFTER. Every policy is compared with the best fixed gamma of its own drafter, and with the best
one of any drafter of the pair, both picked in hindsight. All seconds are modelled. Writes ``drafters.md``, and with
``--doc`` puts the tables between the markers of a document.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.documents import check_place, insert
from experiments.common.trace_sources import check_traces
from experiments.config import launch, option
from experiments.replays.cell import ReplaysConfig, run_cells
from policies.registry import make_policy
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from experiments.replays.cell import Cell
    from speckv_online.simulate.replay_scores import Score

MARKER = "drafters"
POLICIES = (
    "online", "online:lookups=off", "linucb", "lints", "mlp16", "leviathan", "specdecpp",
    "svip", "adaedl", "hf-heuristic", "hf-confidence", "sglang", "vllm", "fixed:4", "autoregressive",
)  # fmt: skip


@dataclass(frozen=True)
class DraftersConfig:
    """Settings of ``python -m experiments.replays.drafters``."""

    traces: tuple[str, ...] = option((), "traces by pair and drafter, PAIR/DRAFTER=DIRECTORY, comma separated")
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: files or built-in names, comma separated")
    policies: tuple[str, ...] = option(POLICIES, "policies, comma separated; the cells in full are of the first")
    split: str = option("test", "which split of the prompts: train, test or all")
    orders: int = option(3, "seeded orders of the prompts; learning policies start afresh in each")
    doc: str = option("", "document to put the tables into, between its markers")
    out: str = option("runs/drafters", "directory of the tables")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if not all(all(text.partition("=")[0].partition("/")[::2]) for text in self.traces):
            raise UserError("--traces wants PAIR/DRAFTER=DIRECTORY, e.g. default/hybrid=runs/hybrid")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(drafters, DraftersConfig, argv)


def drafters(config: DraftersConfig) -> int:
    """Replay everything and write the tables."""
    from speckv_online.io import manifest
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable

    for spec in config.policies:
        make_policy(spec)  # a typo should show at once
    check_place(config.doc, MARKER)
    out = Path(config.out).expanduser()
    check_writable(out)
    replays = ReplaysConfig(**{k: v for k, v in asdict(config).items() if k != "doc"})
    cells = run_cells(replays)
    text = as_document(cells, {"git": manifest.git_state(), "settings": asdict(replays)})
    write_atomically(out / "drafters.md", lambda f: f.write(text))
    if config.doc:
        insert(Path(config.doc), text, MARKER)
    print(text)
    return 0


def names(cell: Cell) -> tuple[str, str]:
    """Return a cell's pair and drafter."""
    pair, _, drafter = cell.pair.partition("/")
    return pair, drafter


def places(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells of each pair, cost table and level: one of each drafter.

    Raises
    ------
    UserError
        If drafters of one pair were traced on other prompts.
    """

    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((names(cell)[0], cell.cost, cell.level), []).append(cell)
    for group in found.values():
        prompts = [[(t.prompt_id, len(t)) for t in cell.evaluation.traces] for cell in group]
        if any(own != prompts[0] for own in prompts):
            raise UserError(
                f"{group[0].pair} and others of its pair hold other outputs at {group[0].level}: collect one and "
                "draft the rest with --reuse"
            )
    return list(found.values())


def best_of_any(group: Sequence[Cell]) -> Score:
    """Return the best fixed gamma of any drafter, in hindsight."""
    return max((cell.evaluation.best for cell in group), key=lambda score: score.goodput)


def as_document(cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    """Return the Markdown of all tables."""
    from experiments.replays.tables import about

    groups = places(cells)
    tables = (_bars(cells), _means(cells, groups), _cells(groups))
    return "\n\n".join([about(cells, facts), *("\n".join(table) for table in tables)]) + "\n"


def _of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by drafter."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(names(cell)[1], []).append(cell)
    return found


def _bars(cells: Sequence[Cell]) -> Iterator[str]:
    from experiments.replays.tables import bars

    first, own = next(iter(cells[0].scores)), _of(cells)
    yield f"### What had to hold, for `{first}` with each drafter\n"
    yield "| | wanted | " + " | ".join(f"{drafter} (cells: {len(group)})" for drafter, group in own.items()) + " |"
    yield "|---|---:|" + "---:|" * len(own)
    for row in zip(*(bars(group, first) for group in own.values()), strict=True):
        found = [bar.verdict + (f" ({re.sub('/[^,]*', '', bar.where)})" if bar.where else "") for bar in row]
        yield f"| {row[0].what} | {row[0].wanted:g} | " + " | ".join(found) + " |"


def _means(cells: Sequence[Cell], groups: Sequence[Sequence[Cell]]) -> Iterator[str]:
    from experiments.replays.tables import mean, over_best

    own = _of(cells)
    rivals = {id(cell): best_of_any(group).goodput for group in groups for cell in group}
    yield "### Geometric means: over the best fixed γ of the same drafter (in the worst cell), and of any drafter\n"
    yield "| policy | " + " | ".join(f"{d}: × its best fixed γ | × that of any" for d in own) + " |"
    yield "|---|" + "---:|---:|" * len(own)
    rows = {}
    for spec in cells[0].scores:
        rows[spec] = [
            ([over_best(c, c.scores[spec]) for c in group], [c.scores[spec].goodput / rivals[id(c)] for c in group])
            for group in own.values()
        ]
    for spec in sorted(rows, key=lambda s: -mean([x for mine, _ in rows[s] for x in mine])):
        line = [f"{mean(mine):.3f} ({min(mine):.3f}) | {mean(every):.3f}" for mine, every in rows[spec]]
        yield f"| `{spec}` | " + " | ".join(line) + " |"


def _cells(groups: Sequence[Sequence[Cell]]) -> Iterator[str]:
    first = next(iter(groups[0][0].scores))
    own = list(dict.fromkeys(names(cell)[1] for group in groups for cell in group))
    yield f"### Tokens per second of the best fixed γ (*hindsight*), and of `{first}` (× it)\n"
    heads = [f"{drafter}: best fixed γ | `{first}`" for drafter in own]
    yield f"| pair, costs, level | {' | '.join(heads)} | the last over the best fixed γ of any [95 %] |"
    yield "|---|" + "---:|---:|" * len(own) + "---:|"
    for group in groups:
        found, line = {names(cell)[1]: cell for cell in group}, []
        for drafter in own:
            if drafter not in found:
                line.append("– | –")
                continue
            best, score = found[drafter].evaluation.best, found[drafter].scores[first]
            ratio = score.goodput / best.goodput
            line.append(f"{best.goodput:.2f} ({best.note}) | {score.goodput:.2f} ({ratio:.3f})")
        last = group[-1]
        line.append(last.scores[first].over(best_of_any(group)).text(3))
        yield f"| {names(last)[0]}, `{last.cost}`, {last.level} | {' | '.join(line)} |"


if __name__ == "__main__":
    sys.exit(main())
