"""Transfer: pretrain on some levels, tasks or pairs, adapt online on another: how many steps the warm start saves.

Each level, task and pair of the traces is left out in turn. What learned policies start from is fitted to the others,
on one half of the prompts; then the policy meets the one that was left out, with the other half. A start from nothing
meets the same stream. Both are compared with a copy that has settled there. All seconds are modelled.

The fitted weights stay in the output directory: ``python -m experiments.compare --policies
online:weights=OUT/level-nf4/mlp16.npz,...`` decodes with them on real models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.documents import check_place, insert
from experiments.common.trace_sources import check_traces
from experiments.config import launch, option
from experiments.streams.warm_start import BIN, SHARE, start
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.simulate.cost_table import CostTable
    from speckv_online.traces.trace import Trace

AXES = ("level", "task", "pair")


@dataclass(frozen=True)
class TransferConfig:
    """Settings of ``python -m experiments.transfer``."""

    traces: tuple[str, ...] = option((), "traces by pair, NAME=DIRECTORY, comma separated")
    cost: str = option("rtx3090-release", "cost table: a file or a built-in name")
    policies: tuple[str, ...] = option(("online",), "policies that learn, comma separated")
    axes: tuple[str, ...] = option(AXES, "what to leave out in turn: level, task, pair, comma separated")
    orders: int = option(10, "seeded orders of the prompts")
    steps: int = option(2000, "steps of adaptation")
    settling: int = option(4000, "steps that the settled copy has behind it")
    seed: int = option(0, "seed of the split of the prompts and of the orders")
    doc: str = option("", "document to put the table into, between its markers")
    images: str = option("", "directory of the plot (default: beside the table)")
    out: str = option("runs/transfer", "directory of the weights, tables and plots")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        if not self.policies or not self.axes or not set(self.axes) <= set(AXES):
            raise UserError(f"--policies and --axes must name at least one; axes are {', '.join(AXES)}")
        if min(self.orders, self.settling) < 1 or self.steps < 2 * BIN or self.seed < 0:
            raise UserError(f"--orders and --settling must be at least 1, --steps {2 * BIN}, --seed 0")


@dataclass(frozen=True)
class Transfer:
    """One policy on one kind that was left out; everything is modelled.

    Attributes
    ----------
    warm, cold : list of int
        Steps until goodput is 95 % of the settled copy's, for each order.
    warm_curve, cold_curve : list of float
        Goodput relative to the settled copy's, by bins of 100 steps, all orders together.
    """

    axis: str
    left_out: str
    policy: str
    warm: list[int]
    cold: list[int]
    warm_curve: list[float]
    cold_curve: list[float]

    @property
    def saved(self) -> float:
        """Steps that the warm start saves, in the median."""
        return float(np.median(self.cold) - np.median(self.warm))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(transfer, TransferConfig, argv)


def transfer(config: TransferConfig) -> int:
    """Leave out, fit, adapt; write ``transfer.json``, ``transfer.md`` and ``transfer.png``, and fill the document."""
    from policies.registry import make_policy
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.reporting.report import markdown_table, text_table
    from speckv_online.simulate.cost_table import load_cost
    from speckv_online.traces.trace import load_traces

    for spec in config.policies:
        if not make_policy(spec).learns:
            raise UserError(f"{spec} does not learn: there is nothing to transfer")
    check_place(config.doc, "transfer")
    out = Path(config.out).expanduser()
    check_writable(out)
    images = Path(config.images).expanduser() if config.images else out
    check_writable(images)
    pairs = {name: load_traces(path) for name, path in (text.split("=", 1) for text in config.traces)}
    cost = load_cost(config.cost)
    found = list(run(config, pairs, cost, out))
    if not found:
        raise UserError("nothing can be left out: the traces have one level, one task and one pair; give more")
    document: dict[str, Any] = {
        "kind": "modelled",
        "cost": cost.name,
        "config": asdict(config) | {"out": "", "doc": "", "images": "", "traces": list(pairs)},
    }
    document["found"] = [asdict(one) | {"saved": one.saved} for one in found]
    write_atomically(out / "transfer.json", lambda f: f.write(json.dumps(document, indent=1) + "\n"))
    table = [HEAD, *map(cells, found)]
    about = (
        f"Modelled, costs of {cost.name}; {config.orders} orders, median and quartiles. Steps until goodput over the "
        "next 200 steps is 95 % of that of a copy which has settled on what was left out. Goodput of the first 100 "
        "steps is relative to that copy's."
    )
    text = "\n".join([about, "", *markdown_table(table)]) + "\n"
    write_atomically(out / "transfer.md", lambda f: f.write(text))
    write_atomically(images / "transfer.png", lambda f: plot(found, f), binary=True)
    if config.doc:
        insert(Path(config.doc), f"{text}\n![Goodput after what was left out](img/transfer.png)\n", "transfer")
    print("\n".join([f"modelled, costs of {cost.name}", "", *text_table(table)]))
    return 0


def run(config: TransferConfig, pairs: dict[str, list[Trace]], cost: CostTable, out: Path) -> Iterator[Transfer]:
    """Yield what every policy does on everything that was left out."""
    from experiments.common.cross_validation import fit_weights, split

    all_of = [(pair, trace) for pair, traces in pairs.items() for trace in traces]
    for level in dict.fromkeys(trace.level for _, trace in all_of):
        cost.level(level)
    fitted = split([trace for _, trace in all_of], 2, config.seed)[0]
    plan: list[tuple[str, str, list[Trace], list[Trace]]] = []
    for axis in config.axes:
        kinds = list(dict.fromkeys(_kind(axis, pair, trace) for pair, trace in all_of))
        for kind in kinds if len(kinds) > 1 else ():
            here = [t for pair, t in all_of if _kind(axis, pair, t) == kind and t.prompt_id not in fitted]
            source = [t for pair, t in all_of if _kind(axis, pair, t) != kind and t.prompt_id in fitted]
            if not here or not source:
                lacking = "to fit to besides it" if here else "of it to play"
                raise UserError(
                    f"{axis} {kind}: the {len(fitted)} prompts that are fitted to leave no traces {lacking}: "
                    f"collect more prompts, or leave {axis} out of --axes"
                )
            plan.append((axis, kind, here, source))
    for axis, kind, here, source in plan:
        print(f"{axis} {kind}: fitting to {len(source)} traces", file=sys.stderr, flush=True)
        levels, tasks = sorted({t.level for t in source}), sorted({t.task for t in source})
        about = {"left_out": {axis: kind}, "fitted_to": {"levels": levels, "tasks": tasks, "prompts": sorted(fitted)}}
        weights = fit_weights(source, config.seed, out / f"{axis}-{kind}", about)
        for spec in config.policies:
            print(f"{axis} {kind}: {spec}", file=sys.stderr, flush=True)
            yield adapt(config, axis, kind, spec, here, cost, weights)


def adapt(
    config: TransferConfig,
    axis: str,
    kind: str,
    spec: str,
    traces: Sequence[Trace],
    cost: CostTable,
    weights: dict[str, Any],
) -> Transfer:
    """Start a policy from fitted weights and from nothing, in several orders of the same traces."""
    found = start(
        spec, traces, cost, orders=config.orders, steps=config.steps, settling=config.settling, seed=config.seed,
        weights=weights,
    ).as_json()  # fmt: skip
    return Transfer(axis, kind, spec, *(found[key] for key in ("warm", "cold", "warm_curve", "cold_curve")))


HEAD = ("left out", "policy", "steps, warm start", "steps, cold start", "saved", "first 100, warm", "first 100, cold")


def cells(one: Transfer) -> tuple[str, ...]:
    """Return a row of the table: medians with quartiles, and goodput of the first 100 steps relative to the settled."""
    quartiles = [
        f"{np.median(x):.0f} ({np.quantile(x, 0.25):.0f} to {np.quantile(x, 0.75):.0f})" for x in (one.warm, one.cold)
    ]
    first = [f"{curve[0]:.3f}" for curve in (one.warm_curve, one.cold_curve)]
    return (f"{one.axis} {one.left_out}", one.policy, *quartiles, f"{one.saved:.0f}", *first)


def plot(found: Sequence[Transfer], file: Any) -> None:
    """Draw goodput relative to the settled copy's over steps: a panel per kind left out, warm solid and cold dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((one.axis, one.left_out) for one in found))
    rows = (len(kinds) + 2) // 3
    figure = Figure(figsize=(10, 0.6 + 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).ravel()
    policies = list(dict.fromkeys(one.policy for one in found))
    for panel, kind in zip(panels, kinds, strict=False):
        for one in (one for one in found if (one.axis, one.left_out) == kind):
            for name, curve, style in (("warm", one.warm_curve, "-"), ("cold", one.cold_curve, "--")):
                x = (np.arange(len(curve)) + 0.5) * BIN
                colour = f"C{policies.index(one.policy)}"
                panel.plot(x, curve, style, color=colour, label=f"{one.policy}, {name} start", linewidth=1.3)
        panel.axhline(SHARE, color="0.6", linewidth=0.8, linestyle=":")
        panel.set_title(f"{kind[0]} {kind[1]}", fontsize=10)
        panel.set_xlabel("steps")
    panels[0].set_ylabel("goodput / settled (modelled)")
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, format="png", dpi=130)


def _kind(axis: str, pair: str, trace: Trace) -> str:
    return {"level": trace.level, "task": trace.task, "pair": pair}[axis]


if __name__ == "__main__":
    sys.exit(main())
