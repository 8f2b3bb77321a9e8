"""A cell of the replay tables: one pair, one level and one cost table, with every policy's score."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from experiments.common.trace_sources import check_traces
from experiments.config import option
from policies.registry import BUILTIN, make_policy
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.simulate.replay_scores import ReplayEvaluation, Score

FIXED = ("autoregressive", *(f"fixed:{gamma}" for gamma in (1, 2, 4, 6, 8, 12, 16)))


RIVER = tuple(f"river:{name}" for name in ("ucb", "exp3", "thompson", "epsilon-greedy", "linucb"))


#: Every registered policy, those that need an option with all that are of interest.
POLICIES = (
    *FIXED,
    *(name for name in BUILTIN if name not in ("autoregressive", "fixed", "river")),
    "online:lookups=off",
    "mlp16:tokens_per_step",
    "ucbspec:tokens_per_second",
    *RIVER,
)


@dataclass(frozen=True)
class ReplaysConfig:
    """Settings of ``python -m experiments.replays``."""

    traces: tuple[str, ...] = option((), "traces by pair, NAME=DIRECTORY, comma separated")
    costs: tuple[str, ...] = option(("rtx3090-release",), "cost tables: files or built-in names, comma separated")
    levels: tuple[str, ...] = option((), "compression levels, comma separated (default: all there are)")
    policies: tuple[str, ...] = option(POLICIES, "policies, comma separated (default: all registered ones)")
    split: str = option("test", "which split of the prompts: train, test or all")
    orders: int = option(10, "seeded orders of the prompts; learning policies start afresh in each")
    seed: int = option(0, "first seed of the orders")
    doc: str = option("", "document to put the tables into, between its markers")
    out: str = option("runs/replays", "directory of the tables")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if not self.costs or not self.policies:
            raise UserError("--costs and --policies must each name at least one")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if self.orders < 1:
            raise UserError("--orders must be at least 1")


@dataclass
class Cell:
    """One pair, cost table and level: its contest and the scores of all policies, by spec."""

    pair: str
    cost: str
    level: str
    evaluation: ReplayEvaluation
    scores: dict[str, Score] = field(default_factory=dict)


def run_cells(config: ReplaysConfig) -> list[Cell]:
    """Play every policy in every cell."""
    from tqdm import tqdm

    from experiments.common.trace_sources import named_costs
    from speckv_online.simulate.hindsight import by_level
    from speckv_online.simulate.replay_scores import ReplayEvaluation, play
    from speckv_online.traces.trace import load_traces

    splits = () if config.split == "all" else (config.split,)
    pairs = dict(text.split("=", 1) for text in config.traces)
    loaded = {name: load_traces(path, levels=config.levels, splits=splits) for name, path in pairs.items()}
    cells = [
        Cell(pair, name, level, ReplayEvaluation(group, table))
        for pair, traces in loaded.items()
        for name, table in named_costs(config.costs)
        for level, group in by_level(traces).items()
    ]
    seeds = range(config.seed, config.seed + config.orders)
    bar = tqdm(total=len(cells) * len(config.policies), unit="policy", disable=not sys.stderr.isatty(), file=sys.stderr)
    for cell in cells:
        if bar.disable:
            where = f"{cell.pair}, {cell.cost}, {cell.level}"
            print(f"{where}: {len(cell.evaluation.traces)} prompts", file=sys.stderr, flush=True)
        for spec in config.policies:
            cell.scores[spec] = play(spec, cell.evaluation.traces, cell.evaluation.cost, seeds)
            bar.update()
    return cells


def is_learned(spec: str) -> bool:
    """True for the policies of this project that learn, guarded as they are by default."""
    return bool(getattr(make_policy(spec), "guarded", False))
