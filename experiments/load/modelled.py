"""Serving in the simulator: what policies would do at other loads, and with several replicas that share.

Takes the tables and traces of ``experiments.load.calibrate``. With ``--measured`` it plays the loads of a load
experiment, and prints what it predicts beside what was measured. All seconds are modelled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import launch, option
from experiments.load.config import DTYPES, METHODS, NONE, TABLE
from speckv_online.errors import UserError


@dataclass(frozen=True)
class ModelledConfig:
    """Settings of ``python -m experiments.load.modelled``."""

    calibrated: str = option("runs/load-costs", "directory of experiments.load.calibrate")
    method: str = option("draft_model", "ngram or draft_model")
    dtype: str = option("bfloat16", "the target's dtype")
    contenders: tuple[str, ...] = option((NONE, "1", "2", "4", "online"), "as for experiments.load, comma separated")
    concurrency: tuple[str, ...] = option(
        ("1", "2", "4", "8", "16", "32", "64"), "requests at a time for each replica, comma separated"
    )
    replicas: tuple[str, ...] = option(("1",), "engines that share what they learn, comma separated")
    requests: int = option(256, "requests for each replica")
    most_drafts: int = option(8, "most drafts that a policy may choose")
    sync_every: int = option(64, "steps between two exchanges with the learner")
    policy_seconds: float = option(0.0, "seconds that the policy takes of a step, as measured in the engine")
    measured: str = option("", "load.json of experiments.load: play its loads, and print ratios to it")
    seed: int = option(0, "seed of the order of requests")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.dtype not in DTYPES:
            raise UserError(f"--method takes {', '.join(METHODS)}, and --dtype {', '.join(DTYPES)}")
        if not all(text.isdigit() and int(text) for text in (*self.concurrency, *self.replicas)):
            raise UserError("--concurrency and --replicas take whole numbers from 1 on")
        if self.requests < 1:
            raise UserError(f"--requests must be 1 or more, got {self.requests}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(modelled, ModelledConfig, argv)


def modelled(config: ModelledConfig) -> int:
    """Play all loads, and print what they come to."""
    from experiments.load.predicted import calibration
    from speckv_online.reporting.report import text_table

    name = f"{config.method}-{config.dtype}"
    costs, traces = calibration(config.calibrated, config.method, config.dtype)
    told = _measured(config) if config.measured else {}
    places = list(dict.fromkeys(key[:2] for key in told)) or [("closed", float(n)) for n in config.concurrency]
    rows: list[dict[str, Any]] = []
    for replicas in map(int, config.replicas):
        for loop, load in places:
            plain = None
            for contender in config.contenders:
                row = _play(config, costs, traces, contender, loop, load, replicas)
                plain = row["throughput"] if contender == NONE else plain
                row["over_none"] = row["throughput"] / plain if plain else None
                if (measured := told.get((loop, load, contender))) is not None:
                    row["predicted_over_measured"] = row["throughput"] / measured
                rows.append(row)
    if config.json:
        print(json.dumps(rows))
        return 0
    head = ("replicas", "load", "contender", "tokens/s", "over none", "TPOT p50 ms", "TTFT p50 ms", "γ", "÷ measured")
    shown = [
        (
            str(row["replicas"]), f"{row['load']:g} {'at a time' if row['loop'] == 'closed' else 'per second'}",
            row["contender"], f"{row['throughput']:.0f}", "" if row["over_none"] is None else f"{row['over_none']:.3f}",
            f"{1e3 * row['median_tpot']:.1f}", f"{1e3 * row['median_ttft']:.0f}", f"{row['mean_gamma']:.1f}",
            f"{row['predicted_over_measured']:.2f}" if "predicted_over_measured" in row else "",
        )
        for row in rows
    ]  # fmt: skip
    print(f"modelled: {name}", *text_table([head, *shown]), sep="\n")
    return 0


def _play(
    config: ModelledConfig, costs: Any, traces: Any, contender: str, loop: str, load: float, replicas: int
) -> dict[str, Any]:
    from experiments.load.predicted import spec
    from speckv_online.serving.engine import Engine
    from speckv_online.simulate.serving import Fleet, Load

    most = max(int(load), 1) if loop == "closed" else 16
    engine = Engine("modelled", config.dtype, config.method, config.method == "ngram", config.most_drafts, most)
    own = 0.0 if contender == NONE or contender.isdigit() else config.policy_seconds
    fleet = Fleet(spec(contender), engine, costs, replicas=replicas, sync_every=config.sync_every, policy_seconds=own)
    closed = int(load) if loop == "closed" else 0
    came = Load(config.requests * replicas, concurrency=closed, rate=0.0 if closed else load)
    served = fleet.serve(traces, came, seed=config.seed)
    return {"replicas": replicas, "loop": loop, "load": load, "contender": contender} | served.as_json()


def _measured(config: ModelledConfig) -> dict[tuple[str, float, str], float]:
    """Return what a load experiment measured, by loop, load and contender."""
    try:
        summaries = json.loads(Path(config.measured).read_text())["summaries"]
        (rows,) = [s["rows"] for s in summaries if (s["method"], s["dtype"]) == (config.method, config.dtype)]
        return {
            (row["loop"], row["load"], row["contender"]): row["output_throughput"]
            for row in rows
            if row["contender"] in config.contenders and row["contender"] != TABLE
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {config.method}, {config.dtype} from {config.measured}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
