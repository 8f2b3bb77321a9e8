"""What each group of signals adds: to the prediction of acceptance (AUC), and to replayed goodput.

The groups come one after another. With each, both regressions of :mod:`policies.acceptance.model` are fitted anew to
the prompts outside of a fold, scored on the prompts inside, and `goodput` replays those from the weights. Signals that
a row does not have are held at weight zero. Seconds are modelled.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from experiments.config import launch, option
from speckv_online.console import say
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.simulate.cost_table import CostTable
    from speckv_online.traces.trace import Trace
    from speckv_online.training.acceptance import Tokens

#: Group -> its columns of the features before a token is drafted, and after (see policies/acceptance/features.py).
GROUPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "acceptance of this text so far": ((6, 7), (4, 7)),
    "entropy, confidence, margin of the draft": ((1, 2, 3), (1, 2, 3)),
    "position in the draft, the token before": ((8,), (5, 6)),
    "agreement with an n-gram lookup": ((4, 5), (8, 9, 10, 11, 12, 13, 14, 15)),
    "the draft after the same 1 to 4 tokens, in this text": ((10, 11, 12, 13), ()),
    "drafts after the same last token, in all texts": ((14,), ()),
    "drafts after the same last two tokens, in all texts": ((15,), ()),
}
#: The constant, and before drafting whether it is the first token: there from the start.
ALWAYS = ((0, 9), (0,))
#: Precision that holds a weight at zero.
HELD = 1e9


@dataclass(frozen=True)
class SignalsConfig:
    """Settings of ``python -m experiments.signals``."""

    traces: str = option("", "directory of traces, from python -m experiments.profile")
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: built-in names or files, comma separated")
    folds: int = option(4, "parts that the prompts are split into; each is scored by a fit to the others")
    seeds: int = option(2, "orders of the prompts in the replays")
    seed: int = option(0, "seed of the split")
    out: str = option("", "Markdown file to write (default: print only)")

    def __post_init__(self) -> None:
        if not self.traces:
            raise UserError("give --traces DIRECTORY, from python -m experiments.profile")
        if not self.costs:
            raise UserError("--costs must name at least one")
        if self.folds < 2 or self.seeds < 1 or self.seed < 0:
            raise UserError("--folds must be at least 2, --seeds at least 1 and --seed at least 0")


@dataclass(frozen=True)
class Row:
    """What the groups up to one reach: AUC before and after drafting, and goodput over the best fixed gamma's."""

    name: str
    before: float
    after: float
    goodput: dict[tuple[str, str], float]

    @property
    def mean(self) -> float:
        """Geometric mean over cost tables and levels."""
        return float(np.exp(np.mean(np.log(list(self.goodput.values())))))


def keep(arrays: dict[str, np.ndarray], columns: tuple[set[int], set[int]]) -> dict[str, np.ndarray]:
    """Return acceptance weights with all but some columns of each head held at zero."""
    found = dict(arrays)
    for name, kept in zip(("before", "after"), columns, strict=True):
        out = np.array([i not in kept for i in range(len(arrays[name]) // 2)])
        found[name] = np.where(np.concatenate([out, out, [False]]), 0.0, arrays[name])
        precision = arrays[f"{name}_precision"].copy()
        precision[out], precision[:, out] = 0.0, 0.0
        precision[out, out] = HELD
        found[f"{name}_precision"] = precision
    return found


def fit(tokens: Tokens, columns: tuple[set[int], set[int]]) -> dict[str, np.ndarray]:
    """Fit both heads to some columns of the rows."""
    from speckv_online.training.acceptance import train_acceptance

    masked = {}
    for name, kept in zip(("before", "after"), columns, strict=True):
        x = getattr(tokens, name).copy()
        x[:, [i for i in range(x.shape[1]) if i not in kept]] = 0.0
        masked[name] = x
    # The table's columns are filled in by the fit: leave them out by emptying the buckets.
    buckets = tokens.buckets.copy()
    for k, column in enumerate((14, 15)):
        if column not in columns[0]:
            buckets[:, k] = -1
    arrays = train_acceptance(replace(tokens, buckets=buckets, **masked))
    return keep(arrays, columns)


def measure(traces: Sequence[Trace], tables: Sequence[CostTable], config: SignalsConfig) -> list[Row]:
    """Fit, score and replay with one group of signals after another."""
    from tqdm import tqdm

    from experiments.common.cross_validation import split
    from speckv_online.io.run_directory import save_arrays
    from speckv_online.simulate.hindsight import by_level
    from speckv_online.simulate.replay_scores import ReplayEvaluation, joined, play
    from speckv_online.training.acceptance import auc, log_odds, tokens_from_traces

    groups = by_level(traces)
    contests = {
        (table.name, level): ReplayEvaluation(group, table) for table in tables for level, group in groups.items()
    }
    tokens = tokens_from_traces(traces, config.seed)
    folds = split(traces, config.folds, config.seed)
    columns: tuple[set[int], set[int]] = (set(ALWAYS[0]), set(ALWAYS[1]))
    rows = []
    with TemporaryDirectory() as folder:
        bar = tqdm(GROUPS.items(), unit="group", disable=not sys.stderr.isatty(), file=sys.stderr)
        for name, added in bar:
            columns = (columns[0] | set(added[0]), columns[1] | set(added[1]))
            scores = np.zeros((2, len(tokens)))
            for i, prompts in enumerate(folds):
                inside = np.isin(tokens.prompt, sorted(prompts))
                arrays = fit(tokens[~inside], columns)
                save_arrays(Path(folder) / f"{i}.npz", arrays)
                scores[:, inside] = log_odds(arrays, tokens[inside])
            found = {}
            for cell, evaluation in contests.items():
                parts = []
                for i, prompts in enumerate(folds):
                    mine = [t for t in evaluation.traces if t.prompt_id in prompts]
                    spec = f"online:safety=off,acceptance={Path(folder) / f'{i}.npz'}"
                    parts.append((mine, play(spec, mine, evaluation.cost, range(config.seeds))))
                found[cell] = joined(evaluation.traces, parts).goodput / evaluation.best.goodput
            rows.append(Row(name, auc(scores[0], tokens.y) or 0.5, auc(scores[1], tokens.y) or 0.5, found))
            if bar.disable:
                say(f"{len(rows)} of {len(GROUPS)}: {name}, mean {rows[-1].mean:.3f}")
    return rows


def show(rows: Sequence[Row], traces: Sequence[Trace], tables: Sequence[CostTable], config: SignalsConfig) -> str:
    """Return the report as Markdown."""
    cells = list(rows[0].goodput)
    head = ["signals so far", "AUC before", "AUC after", "mean", *(f"{cost} {level}" for cost, level in cells)]
    lines = [
        "# What the signals add",
        "",
        f"Written by `python -m experiments.signals`: {len({t.prompt_id for t in traces})} prompts, "
        f"{len(traces)} traces, {sum(len(t) for t in traces)} tokens, {config.folds} folds over prompts, "
        f"{config.seeds} order(s). Costs: {'; '.join(f'{t.name} ({t.source})' for t in tables)}.",
        "",
        "Each row adds a group of signals to those above it. `AUC before` is the area under the ROC curve for the "
        "acceptance of a token before it is drafted, `AUC after` once it is; both on held-out prompts. The other "
        "columns are `goodput`'s modelled goodput over that of the best fixed gamma *in hindsight* of the same cell "
        "(without the safety guard's probes), and their geometric mean.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for row in rows:
        values = [row.before, row.after, row.mean, *(row.goodput[cell] for cell in cells)]
        lines.append(f"| {row.name} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def signals(config: SignalsConfig) -> int:
    """Measure and report."""
    from experiments.common.trace_sources import named_costs
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.traces.trace import load_traces

    if config.out:
        check_writable(Path(config.out).expanduser().parent)
    traces = load_traces(config.traces)
    tables = [table for _, table in named_costs(config.costs)]
    text = show(measure(traces, tables, config), traces, tables, config)
    print(text)
    if config.out:
        path = Path(config.out).expanduser()
        write_atomically(path, lambda f: f.write(text))
        print(f"wrote {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(signals, SignalsConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
