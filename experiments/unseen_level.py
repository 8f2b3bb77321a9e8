"""A level never met before: learn online at the others, then decode at it, with and without its description.

Each level of the traces is left out in turn. A policy learns over the training traces of the others, in seeded orders,
and goes on with the test traces of the one that was left out. It plays twice: with the level described to it by bits
per weight, measured cost of a drafted token and growth of verify time (``levels=described``), and by MLP16's code alone
(``levels=code``). As in decoding, the costs of all levels are known from a calibration. All seconds are modelled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import launch, option
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from policies.base import Policy
    from speckv_online.simulate.cost_table import CostTable
    from speckv_online.traces.trace import Trace

KINDS = ("code", "described")
HEAD = ("left out", "policy", "tokens/s, code", "tokens/s, described", "described ÷ code [95 %]")


@dataclass(frozen=True)
class UnseenConfig:
    """Settings of ``python -m experiments.unseen_level``."""

    train: str = option("runs/train", "directory of traces to learn from")
    test: str = option("runs/test", "directory of traces of other prompts, to be scored on")
    cost: str = option("rtx3090-release", "cost table: a file or a built-in name")
    policies: tuple[str, ...] = option(
        ("online", "linucb", "lints"), "policies that take levels=described|code, comma separated"
    )
    orders: int = option(10, "seeded orders of the prompts")
    seed: int = option(0, "seed of the first order")
    out: str = option("runs/unseen-level", "directory of the tables")

    def __post_init__(self) -> None:
        if not self.policies or self.orders < 1 or self.seed < 0:
            raise UserError("--policies must name at least one, --orders be at least 1 and --seed not negative")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(unseen_level, UnseenConfig, argv)


def unseen_level(config: UnseenConfig) -> int:
    """Leave out each level; write ``unseen-level.json`` and ``unseen-level.md``."""
    from policies.registry import make_policy, options
    from speckv_online.io import manifest
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.reporting.report import markdown_table, text_table
    from speckv_online.simulate.cost_table import load_cost

    for spec in config.policies:
        make_policy(spec)
        if "levels" not in options(spec.partition(":")[0]) or "levels=" in spec:
            raise UserError(f"{spec} is not a policy with the option levels, to be left open: try online or linucb")
    out = Path(config.out).expanduser()
    check_writable(out)
    cost = load_cost(config.cost)
    rows = play_all(config, cost)
    table = [HEAD, *map(cells, rows)]
    text = "\n".join(markdown_table(table))
    document = {"seconds": "modelled", "cost": cost.name, "git": manifest.git_state(), "settings": asdict(config)}
    write_atomically(
        out / "unseen-level.json", lambda f: f.write(json.dumps(document | {"rows": rows}, indent=1) + "\n")
    )
    write_atomically(out / "unseen-level.md", lambda f: f.write(f"Modelled, costs of {cost.name}.\n\n{text}\n"))
    print("\n".join([f"modelled, costs of {cost.name}", "", *text_table(table)]))
    return 0


def experienced(
    spec: str, cost: CostTable, levels: Sequence[str], seed: int, *, source: Sequence[Trace], **defaults: Any
) -> Policy:
    """Make a policy, tell it the costs of all levels, and let it learn over traces of other levels."""
    from speckv_online.simulate.replay_scores import prepared
    from speckv_online.simulate.simulator import Simulator

    policy = prepared(spec, cost, {*levels, *(t.level for t in source)}, seed, **defaults)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    Simulator(policy, cost).run([source[i] for i in order])
    return policy


def play_all(config: UnseenConfig, cost: CostTable) -> list[dict[str, Any]]:
    """Return a row for every level and policy."""
    from speckv_online.simulate.hindsight import by_level
    from speckv_online.simulate.replay_scores import play
    from speckv_online.traces.trace import load_traces

    known, met = load_traces(config.train), load_traces(config.test)
    if shared := {t.prompt_id for t in known} & {t.prompt_id for t in met}:
        raise UserError(f"{len(shared)} prompts are in --train and in --test, e.g. {min(shared)}: score on others")
    sources, tests = by_level(known), by_level(met)
    if not all(set(sources) - {level} for level in tests):
        raise UserError("leaving a level out takes traces of another one to learn from: give more with --train")
    seeds = range(config.seed, config.seed + config.orders)
    rows = []
    for level, group in tests.items():
        source = [t for name, traces in sources.items() if name != level for t in traces]
        print(f"{level}: learning from {len(source)} traces of other levels", file=sys.stderr, flush=True)
        for spec in config.policies:
            start = f"{spec}{',' if ':' in spec else ':'}levels="
            both = [play(start + kind, group, cost, seeds, make=experienced, source=source) for kind in KINDS]
            row = {kind: score.goodput for kind, score in zip(KINDS, both, strict=True)}
            rows.append({"level": level, "policy": spec} | row | asdict(both[1].over(both[0])))
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table; the interval is over prompts."""
    rates = [f"{row[kind]:.2f}" for kind in KINDS]
    return (row["level"], row["policy"], *rates, f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")


if __name__ == "__main__":
    sys.exit(main())
