"""Replay every policy on exact traces: all pairs of models x levels x cost files, against what hindsight knows.

Each cell (one pair, level and cost file) is a contest of its own: policies start from what ships, are told the costs as
after a calibration, and learn from prompt to prompt, in several seeded orders. All seconds are modelled. Writes
``replays.json`` and ``replays.md``, and with ``--doc`` puts the tables between the markers of a document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import launch, option
from experiments.documents import check_place, insert
from policies.registry import BUILTIN, make_policy
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.contest import Contest, Score
    from speckv_online.traces import Trace

FIXED = ("autoregressive", *(f"fixed:{gamma}" for gamma in (1, 2, 4, 6, 8, 12, 16)))
RIVER = tuple(f"river:{name}" for name in ("ucb", "exp3", "thompson", "epsilon-greedy", "linucb"))
#: Every registered policy, those that need an option with all that are of interest.
POLICIES = (
    *FIXED,
    *(name for name in BUILTIN if name not in ("autoregressive", "best-drafter", "fixed", "river")),
    "goodput:lookups=off",
    "mlp16:tokens_per_step",
    "ucbspec:tokens_per_second",
    *RIVER,
)
MARKER = "replays"


@dataclass(frozen=True)
class ReplaysConfig:
    """Settings of ``python -m experiments.replays``."""

    traces: tuple[str, ...] = option((), "traces by pair, NAME=DIRECTORY, comma separated")
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: files or built-in names, comma separated")
    levels: tuple[str, ...] = option((), "compression levels, comma separated (default: all there are)")
    policies: tuple[str, ...] = option(POLICIES, "policies, comma separated (default: all registered ones)")
    split: str = option("test", "which split of the prompts: train, test or all")
    orders: int = option(10, "seeded orders of the prompts; learning policies start afresh in each")
    folds: int = option(0, "fit what learned policies start from anew, k-fold over the prompts (0: what ships)")
    seed: int = option(0, "first seed of the orders, and seed of the folds")
    doc: str = option("", "document to put the tables into, between its markers")
    out: str = option("runs/replays", "directory of the tables")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if not self.costs or not self.policies:
            raise UserError("--costs and --policies must each name at least one")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if self.orders < 1 or self.folds < 0 or self.folds == 1:
            raise UserError("--orders must be at least 1, --folds 0 or at least 2")


def check_traces(traces: Sequence[str], said: str = "--traces") -> None:
    """Raise :class:`UserError` unless every item is NAME=DIRECTORY with a name of its own; ``said`` is the option."""
    names = [text.partition("=")[0] for text in traces]
    if not traces or not all("=" in text for text in traces) or len(set(names)) < len(names):
        raise UserError(f"{said} wants NAME=DIRECTORY, each name once, e.g. default=runs/test,high=runs/high")


@dataclass
class Cell:
    """One pair, cost table and level: its contest and the scores of all policies, by spec."""

    pair: str
    cost: str
    level: str
    contest: Contest
    scores: dict[str, Score] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(replays, ReplaysConfig, argv)


def replays(config: ReplaysConfig) -> int:
    """Run all contests and write the tables."""
    from experiments.replay_tables import as_document, as_json
    from speckv_online import manifest
    from speckv_online.files import write_atomically
    from speckv_online.rundir import check_writable

    for spec in config.policies:
        make_policy(spec)  # a typo should show at once
    check_place(config.doc, MARKER)
    out = Path(config.out).expanduser()
    check_writable(out)
    cells = run_cells(config, out)
    facts = {"git": manifest.git_state(), "settings": asdict(config), "made": manifest.now()}
    learned = [spec for spec in config.policies if is_learned(spec)]
    text = as_document(cells, learned, facts)
    document = json.dumps(as_json(cells, learned, facts), indent=1) + "\n"
    write_atomically(out / "replays.json", lambda f: f.write(document))
    write_atomically(out / "replays.md", lambda f: f.write(text))
    if config.doc:
        insert(Path(config.doc), text, MARKER)
    print(text)
    return 0


def run_cells(config: ReplaysConfig, out: Path) -> list[Cell]:
    """Play every policy in every cell."""
    from tqdm import tqdm

    from experiments.folds import Fold, fit_folds
    from experiments.stream_cells import named_costs
    from speckv_online.contest import Contest
    from speckv_online.hindsight import by_level
    from speckv_online.traces import load_traces

    splits = () if config.split == "all" else (config.split,)
    pairs = dict(text.split("=", 1) for text in config.traces)
    loaded = {name: load_traces(path, levels=config.levels, splits=splits) for name, path in pairs.items()}
    cells = [
        Cell(pair, name, level, Contest(group, table))
        for pair, traces in loaded.items()
        for name, table in named_costs(config.costs)
        for level, group in by_level(traces).items()
    ]
    folds = [Fold(None)]
    if config.folds:
        # What ships is fitted to one pair and used for all: so are the folds' weights, to the pair named first.
        first, *others = loaded.values()
        folds = fit_folds(first, config.folds, config.seed, out / "folds")
        # No fold was fitted to prompts that this pair does not have.
        more = {t.prompt_id for traces in others for t in traces} - {t.prompt_id for t in first}
        folds[0] = Fold(frozenset(more.union(folds[0].prompts or ())), folds[0].defaults)
    seeds = range(config.seed, config.seed + config.orders)
    bar = tqdm(total=len(cells) * len(config.policies), unit="policy", disable=not sys.stderr.isatty(), file=sys.stderr)
    for cell in cells:
        if bar.disable:
            where = f"{cell.pair}, {cell.cost}, {cell.level}"
            print(f"{where}: {len(cell.contest.traces)} prompts", file=sys.stderr, flush=True)
        for spec in config.policies:
            cell.scores[spec] = play_folds(spec, cell.contest, folds, seeds)
            bar.update()
    return cells


def play_folds(spec: str, contest: Contest, folds: list[Any], seeds: Sequence[int]) -> Score:
    """Play a policy on each fold's prompts, with the weights that were fitted to the others."""
    from speckv_online.contest import joined, play

    parts: list[tuple[list[Trace], Score]] = []
    for fold in folds:
        own = [t for t in contest.traces if fold.holds(t)]
        if own:
            parts.append((own, play(spec, own, contest.cost, seeds, **fold.defaults)))
    return joined(contest.traces, parts)


def is_learned(spec: str) -> bool:
    """True for the policies of this project that learn, guarded as they are by default."""
    return bool(getattr(make_policy(spec), "guarded", False))


if __name__ == "__main__":
    sys.exit(main())
