"""Scaling: real workers on this machine, simulated ones on traces, and the arithmetic of messages and the learner.

``real`` runs ``experiments.compare`` with each number of workers, one thread each, and adds their goodputs up
(measured). ``simulated`` lets workers start from nothing, each on its own stream of traces, merging every so many steps
through a learner whose answers lack what others sent in the latest ``delay`` steps (modelled). ``arithmetic`` weighs a
batch and a state of each policy, times a merge here, and says where one learner saturates (calculated).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.common.documents import check_place, insert
from experiments.config import launch, option
from experiments.runtime.settings import CompareConfig
from speckv_online.errors import UserError

PARTS = ("real", "simulated", "arithmetic")


@dataclass(frozen=True)
class ScaleConfig:
    """Settings of ``python -m experiments.scale``."""

    parts: tuple[str, ...] = option(("simulated", "arithmetic"), f"what to do: {', '.join(PARTS)}, comma separated")
    policies: tuple[str, ...] = option(("online", "linucb"), "policies that learn, comma separated")
    real: tuple[str, ...] = option(("1", "2"), "real: numbers of workers, comma separated")
    level: str = option("int8", "compression level, of --traces too")
    prompts: str = option("8", "real: how many of the bundled held-out prompts, or a JSONL file")
    max_new_tokens: int = option(32, "real: tokens to decode per prompt")
    target: str | None = option(None, "real: target model (with --draft)")
    draft: str | None = option(None, "real: draft model")
    traces: str = option("", "simulated, and real batches for the arithmetic: directory of traces")
    cost: str = option("rtx3090-release", "what --traces are replayed with: cost table, a file or a built-in name")
    workers: tuple[str, ...] = option(("1", "4", "16", "64", "256", "1024"), "simulated: numbers of workers")
    delays: tuple[str, ...] = option(("0", "100"), "simulated: steps until a batch is in what others get")
    every: int = option(32, "steps between exchanges with the learner")
    steps: int = option(320, "simulated: steps of each worker")
    walkers: int = option(16, "simulated: least streams behind a figure; few workers are run with several seeds")
    fleet: int = option(256, "arithmetic: workers whose batches come in between two of one worker")
    rate: float = option(20.0, "arithmetic: decoding steps per second of a worker")
    seed: int = option(0, "seed of the streams")
    processes: int = option(1, "simulated: how many numbers of workers to simulate at a time")
    doc: str = option("", "document to put the tables into, each between the markers of its part")
    images: str = option("", "directory of scale.png (default: beside scale.json)")
    out: str = option("runs/scale", "directory of scale.json and the runs")

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS) or not self.policies:
            raise UserError(f"--parts and --policies must name at least one; parts are {', '.join(PARTS)}")
        for name, least in (("real", 1), ("workers", 1), ("delays", 0)):
            if not all(text.isdecimal() and int(text) >= least for text in getattr(self, name)) or not getattr(
                self, name
            ):
                raise UserError(f"--{name} must be whole numbers of at least {least}")
        counts = ("every", "steps", "max_new_tokens", "walkers", "fleet", "processes")
        if min(getattr(self, name) for name in counts) < 1 or not 0 < self.rate < math.inf or self.seed < 0:
            raise UserError(f"{', '.join(counts)} must be at least 1, --rate above zero, --seed not negative")
        if "simulated" in self.parts and not self.traces:
            raise UserError("the part simulated needs --traces DIRECTORY, from python -m experiments.profile")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(scale, ScaleConfig, argv)


def scale(config: ScaleConfig) -> int:
    """Do the parts; print their tables, write ``scale.json`` and, of what was simulated, ``scale.png``."""
    from policies.registry import make_policy
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.reporting.report import markdown_table, text_table

    for spec in config.policies:
        if not make_policy(spec).take_delta():
            raise UserError(f"{spec} shares nothing with other workers: choose policies that learn")
    check_place(config.doc, *(f"scale-{part}" for part in config.parts))
    out = Path(config.out).expanduser().resolve()
    check_writable(out)
    if "simulated" in config.parts and config.images:
        check_writable(Path(config.images).expanduser())
    file = out / "scale.json"
    document: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part, do in (("real", _real), ("simulated", _simulated), ("arithmetic", _arithmetic)):
        if part in config.parts:
            rows, kind = do(config, out)
            settings = asdict(config) | dict.fromkeys(("out", "doc", "images", "traces"), "")
            document[part] = {"kind": kind, "config": settings, "rows": rows}
            write_atomically(file, lambda f: f.write(json.dumps(document, indent=1) + "\n"))
            table = [tuple(rows[0]), *(tuple(_show(value) for value in row.values()) for row in rows)]
            print("\n".join([f"{part} ({kind})", *text_table(table), ""]), flush=True)
            if config.doc:
                picture = ["", "![Goodput of a worker, by number of workers](img/scale.png)"] * (part == "simulated")
                text = "\n".join([f"{kind[0].upper()}{kind[1:]}.", "", *markdown_table(table), *picture])
                insert(Path(config.doc), text + "\n", f"scale-{part}")
    if "simulated" in config.parts:
        images = Path(config.images).expanduser() if config.images else out
        write_atomically(images / "scale.png", lambda f: plot(document["simulated"]["rows"], f), binary=True)
    return 0


def _real(config: ScaleConfig, out: Path) -> tuple[list[dict[str, Any]], str]:
    """Decode the same prompts with different numbers of workers, each run in a directory of its own."""
    from experiments.compare.__main__ import compare
    from speckv_online.io.run_directory import read_units

    base = CompareConfig(
        target=config.target, draft=config.draft, levels=(config.level,), policies=config.policies,
        prompts=config.prompts, max_new_tokens=config.max_new_tokens, seed=config.seed, sync_every=config.every,
        threads=1,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for count in map(int, config.real):
        path = out / f"real-{count}"
        if code := compare(replace(base, workers=count, out=str(path))):
            raise UserError(f"the run with {count} workers failed with exit code {code}: see {path}")
        for policy in config.policies:
            sums: dict[int, list[float]] = {}
            lag = 0
            for unit in read_units(path):
                if unit.unit.policy == policy:
                    own = sums.setdefault(unit.facts["worker"], [0.0, 0.0])
                    own[0] += unit.tokens
                    own[1] += unit.seconds
                    lag = max(lag, unit.facts["version_lag"])
            together = sum(tokens / seconds for tokens, seconds in sums.values())
            first = next((row["tokens/s, all workers"] for row in rows if row["policy"] == policy), together)
            row = {"policy": policy, "level": config.level, "workers": count, "tokens/s, all workers": together}
            rows.append(row | {"of linear": together / first / (count / int(config.real[0])), "largest lag": lag})
    return rows, "measured"


def _simulated(config: ScaleConfig, out: Path) -> tuple[list[dict[str, Any]], str]:
    from experiments.common.cached_cells import contents, run
    from experiments.scale.simulated import play
    from speckv_online.simulate.cost_table import load_cost

    todo = [(spec, delay, count) for spec in config.policies for delay in config.delays for count in config.workers]
    setting = {name: getattr(config, name) for name in ("level", "every", "steps", "seed", "walkers")}
    found = run(
        todo,
        partial(play, traces=config.traces, cost=config.cost, **setting),
        out / "simulated.jsonl",
        code=["experiments.scale.simulated"],
        policies=config.policies,
        settings=json.dumps([contents([config.traces, config.cost]), setting]),
        weight=lambda cell: int(cell[2]),
        processes=config.processes,
    )
    rows = [
        {
            "policy": spec,
            "level": config.level,
            "delay": int(delay),
            "workers": int(count),
            "tokens/s, per worker": found[spec, delay, count],
        }
        for spec, delay, count in todo
    ]
    cost = load_cost(config.cost).name
    return rows, f"modelled, costs of {cost}; first {config.steps} steps of each worker, from a cold start"


def _arithmetic(config: ScaleConfig, out: Path) -> tuple[list[dict[str, Any]], str]:
    from experiments.scale.exchange_cost import made_up, observed, weigh
    from speckv_online.simulate.cost_table import load_cost
    from speckv_online.traces.trace import load_traces

    traces = load_traces(config.traces, levels=[config.level]) if config.traces else []
    rows: list[dict[str, Any]] = []
    for policy in config.policies:
        if traces:
            batches = observed(policy, config.every, traces, load_cost(config.cost), config.fleet)
        else:
            batches = made_up(policy, config.every, config.fleet)
        load = weigh(policy, batches, out)
        exchanges = config.rate / config.every
        rows.append(
            {
                "policy": policy,
                "exchanges/s": exchanges,
                "kB/batch": load.sent / 1e3,
                "kB back, 1 worker": load.alone / 1e3,
                f"kB back, {config.fleet}": load.received / 1e3,
                "kB/s up": exchanges * load.sent / 1e3,
                f"kB/s down, {config.fleet}": exchanges * load.received / 1e3,
                "ms/batch (measured)": 1e3 * load.seconds,
                "outcomes/s, one learner": config.every / load.seconds,
                "workers at saturation": int(1 / load.seconds / exchanges),
            }
        )
    kind = "real traces" if traces else "made-up steps without tokens"
    return rows, (
        f"calculated for {config.rate:g} steps/s per worker and an exchange every {config.every}, by batches of "
        f"{kind}; bytes back to one worker that is alone, and to one of {config.fleet}"
    )


def plot(rows: Sequence[dict[str, Any]], file: Any) -> None:
    """Draw each worker's goodput against the number of workers, a line per policy and delay, as PNG."""
    from speckv_online.reporting.plots import figure

    def draw(axes: Any) -> None:
        for policy, delay in dict.fromkeys((row["policy"], row["delay"]) for row in rows):
            own = [row for row in rows if (row["policy"], row["delay"]) == (policy, delay)]
            x, y = [row["workers"] for row in own], [row["tokens/s, per worker"] for row in own]
            axes.plot(x, y, marker="o", markersize=4, label=f"{policy}, delay {delay}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("workers")
        axes.set_ylabel("tokens/s per worker (modelled)")
        axes.legend(frameon=False, fontsize="small")

    file.write(figure(draw))


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
