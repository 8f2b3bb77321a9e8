"""The tables of ``python -m experiments.replays``: bars, geometric means over the cells, and every cell in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from experiments.replays.cell import Cell
    from speckv_online.simulate.replay_scores import Score
    from speckv_online.traces.trace import Trace


@dataclass(frozen=True)
class Bar:
    """One thing that has to hold, what was found, and where it was worst."""

    what: str
    wanted: float
    found: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """True if it does."""
        return self.found >= self.wanted

    @property
    def verdict(self) -> str:
        """What was found, and whether it holds, as a table's cell."""
        return f"{self.found:.3f} {'pass' if self.holds else '**fail**'}"


def mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def over_best(cell: Cell, score: Score) -> float:
    """Goodput over that of the best fixed gamma in hindsight."""
    return score.goodput / cell.evaluation.best.goodput


def over_threshold(cell: Cell, score: Score) -> float:
    """Goodput over that of the best threshold rule tuned in hindsight."""
    return score.goodput / cell.evaluation.thresholds[0].goodput


def over_four(cell: Cell, score: Score) -> float:
    """Goodput over that of the customary gamma of 4."""
    return score.goodput / cell.evaluation.fixed(4).goodput


def over_plain(cell: Cell, score: Score) -> float:
    """Goodput over that of decoding without a draft."""
    return score.goodput / cell.evaluation.plain.goodput


def over_any(cell: Cell, score: Score) -> float:
    """Goodput over the best fixed gamma of the drafter or of lookups alone."""
    best, lookup = cell.evaluation.best, cell.evaluation.best_lookup
    return score.goodput / max(best.goodput, 0.0 if lookup is None else lookup.goodput)


def gap_closed(cell: Cell, score: Score) -> float:
    """Share of the way from the best fixed gamma to the clairvoyant bound, both of hindsight."""
    best, bound = cell.evaluation.best.goodput, cell.evaluation.clairvoyant.goodput
    return (score.goodput - best) / (bound - best) if bound > best else math.nan


def ranked(cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
    """Policies by their geometric mean over the best fixed gamma, best first."""
    return sorted(names, key=lambda spec: -mean([over_best(c, c.scores[spec]) for c in cells]))


def bars(cells: Sequence[Cell], spec: str) -> list[Bar]:
    """Return the bars for one policy."""

    def least(what: str, wanted: float, ratio: Callable[[Cell, Score], float]) -> Bar:
        worst = min(cells, key=lambda c: ratio(c, c.scores[spec]))
        where = f"{worst.pair}, {worst.cost}, {worst.level}"
        return Bar(f"{what}, in every cell", wanted, ratio(worst, worst.scores[spec]), where)

    def overall(what: str, wanted: float, ratio: Callable[[Cell, Score], float]) -> Bar:
        return Bar(f"{what}, geometric mean", wanted, mean([ratio(c, c.scores[spec]) for c in cells]))

    gaps = [gap for c in cells if not math.isnan(gap := gap_closed(c, c.scores[spec]))]
    return [
        least("over the best fixed γ in hindsight", 0.99, over_best),
        overall("over the best fixed γ in hindsight", 1.06, over_best),
        least("over the best fixed γ in hindsight, of the drafter or of lookups alone", 0.99, over_any),
        overall("over the best fixed γ in hindsight, of the drafter or of lookups alone", 1.06, over_any),
        least("over the best threshold rule tuned in hindsight", 0.995, over_threshold),
        overall("over the best threshold rule tuned in hindsight", 1.02, over_threshold),
        overall("over `fixed:4`", 1.2, over_four),
        Bar(
            "of the gap from the best fixed γ to the clairvoyant closed, mean", 0.4, float(np.mean(gaps or [math.nan]))
        ),
    ]


def as_json(cells: Sequence[Cell], learned: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Return everything as plain data."""
    rows = []
    for cell in cells:
        about = {"pair": cell.pair, "cost": cell.cost, "level": cell.level, "prompts": len(cell.evaluation.traces)}
        for spec, score in _rows(cell):
            best = score.over(cell.evaluation.best)
            rows.append(
                about
                | {"policy": spec, "kind": score.kind, "note": score.note, "goodput": score.goodput}
                | {"over_plain": asdict(score.over(cell.evaluation.plain)), "over_best_fixed": asdict(best)}
                | {"of_clairvoyant": score.goodput / cell.evaluation.clairvoyant.goodput}
                | {"orders": score.orders.tolist(), "steps": score.steps, "faults": score.faults}
                | {name: getattr(score, name) for name in ("drafted", "accepted", "proposed")}
            )
    found = {spec: [asdict(bar) | {"holds": bar.holds} for bar in bars(cells, spec)] for spec in learned}
    return {"seconds": "modelled", "facts": facts, "bars": found, "rows": rows}


def as_document(cells: Sequence[Cell], learned: Sequence[str], facts: dict[str, Any]) -> str:
    """Return the Markdown of all tables."""
    parts = [about(cells, facts)]
    if faults := {spec: n for spec in cells[0].scores if (n := sum(c.scores[spec].faults for c in cells))}:
        told = ", ".join(f"`{spec}` {n} times" for spec, n in faults.items())
        parts.append(f"**Policies that raised and fell back to a fixed γ**, so that their rows are not theirs: {told}.")
    if learned:
        parts += ["\n".join(_bars(cells, ranked(cells, learned)))]
    parts += ["\n".join(_overall(cells))]
    for pair, cost in dict.fromkeys((c.pair, c.cost) for c in cells):
        parts.append("\n".join(_cells([c for c in cells if (c.pair, c.cost) == (pair, cost)])))
    return "\n\n".join(parts) + "\n"


def about(cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    """Return a paragraph on what the tables are made of."""
    settings, git = facts["settings"], facts["git"]
    counts = ", ".join(f"{pair} {len({t.prompt_id for t in traces})}" for pair, traces in _traces(cells).items())
    commit = f"{str(git['commit'])[:10]}{', with changes' if git['dirty'] else ''}" if git.get("commit") else "unknown"
    return (
        f"All figures are `modelled`: exact traces replayed with a cost table's seconds. {len(cells)} cells; prompts "
        f"by pair: {counts} (split: {settings['split']}); {settings['orders']} seeded orders of the prompts; learned "
        "policies start from the shipped weights. Intervals are 95 %, by bootstrap over prompts. Rows marked "
        "*hindsight* were chosen on the outcomes that they are scored on, and no policy could have known them. "
        f"Commit: {commit}."
    )


def _traces(cells: Sequence[Cell]) -> dict[str, list[Trace]]:
    """Traces by pair."""
    found: dict[str, list[Trace]] = {}
    for cell in cells:
        found.setdefault(cell.pair, []).extend(cell.evaluation.traces)
    return found


def _bars(cells: Sequence[Cell], names: Sequence[str]) -> Iterator[str]:
    best = names[0]
    yield f"### What had to hold\n\nThe best learned policy over all cells is `{best}`, one configuration throughout.\n"
    yield "| | wanted | " + " | ".join(f"`{n}`" for n in names) + " | worst cell of the best |"
    yield "|---|---:|" + "---:|" * len(names) + "---|"
    columns = [bars(cells, name) for name in names]
    for row in zip(*columns, strict=True):
        yield f"| {row[0].what} | {row[0].wanted:g} | " + " | ".join(b.verdict for b in row) + f" | {row[0].where} |"


def _overall(cells: Sequence[Cell]) -> Iterator[str]:
    yield f"### Geometric means over the {len(cells)} cells\n"
    heads = ("× no draft", "× best fixed γ (hindsight)", "in its worst cell", "× best threshold rule (hindsight)")
    yield f"| policy | {' | '.join(heads)} | × `fixed:4` | gap closed |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    rows = {name: [(cell, dict(_rows(cell))[name]) for cell in cells] for name, _ in _rows(cells[0])}
    for name in sorted(rows, key=lambda n: -mean([over_best(*pair) for pair in rows[n]])):
        pairs = rows[name]
        mark = "" if pairs[0][1].kind == "policy" else " *hindsight*"
        best = [over_best(*pair) for pair in pairs]
        closed = float(np.nanmean([gap_closed(*pair) for pair in pairs]))
        values = [mean([over_plain(*p) for p in pairs]), mean(best), min(best)]
        values += [mean([over_threshold(*p) for p in pairs]), mean([over_four(*p) for p in pairs])]
        yield f"| `{name}`{mark} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {100 * closed:.0f} % |"


def _rows(cell: Cell) -> list[tuple[str, Score]]:
    """All rows of a cell; names of hindsight rows do not depend on what was chosen."""
    return [*cell.scores.items(), *((s.name, s) for s in cell.evaluation.hindsight())]


def _cells(cells: Sequence[Cell]) -> Iterator[str]:
    """One pair and cost table, levels side by side."""
    yield f"### Pair {cells[0].pair}, costs `{cells[0].cost}`\n"
    yield (
        "| policy | "
        + " | ".join(f"{c.level}: tokens/s | × best fixed γ [95 %] | of clairvoyant" for c in cells)
        + " |"
    )
    yield "|---|" + "---:|---:|---:|" * len(cells)
    rows = [dict(_rows(cell)) for cell in cells]
    for name in rows[0]:
        line = []
        for cell, found in zip(cells, rows, strict=True):
            score = found[name]
            share = score.goodput / cell.evaluation.clairvoyant.goodput
            note = f" ({score.note})" if score.note else ""
            line.append(f"{score.goodput:.2f}{note} | {score.over(cell.evaluation.best).text(3)} | {share:.2f}")
        mark = "" if rows[0][name].kind == "policy" else " *hindsight*"
        yield f"| `{name}`{mark} | " + " | ".join(line) + " |"
