"""What the serving simulator predicts for a load experiment: the same contenders, loads and numbers of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from experiments.load.cell import answers
from experiments.load.config import NONE, TABLE, WARM, LoadConfig
from speckv_online.serving.engine import Engine
from speckv_online.simulate.engine_costs import EngineCosts
from speckv_online.simulate.serving import Fleet, Load
from speckv_online.traces.trace import Trace, load_traces


def calibration(folder: str, method: str, dtype: str) -> tuple[EngineCosts, list[Trace]]:
    """Return what a calibration measured: the costs, and the traces."""
    path = Path(folder).expanduser()
    return EngineCosts.load(path / f"{method}-{dtype}.json"), load_traces(path / f"{method}-{dtype}")


def spec(contender: str, table: Sequence[Sequence[int]] = ()) -> str:
    """Return the policy that does what a contender does; ``table`` is vLLM's as tuned.

    >>> spec("2"), spec("none"), spec("table", [[1, 4, 2], [5, 16, 0]])
    ('fixed:2', 'autoregressive', 'vllm-table:1/4/2/5/16/0')
    """
    if contender == TABLE:
        return "vllm-table:" + "/".join(str(number) for row in table for number in row)
    if contender == NONE:
        return "autoregressive"
    return f"fixed:{contender}" if contender.isdigit() else contender.removeprefix(WARM)


def cut(trace: Trace, length: int) -> Trace:
    """Return the first tokens of a trace, as if no more had been asked for."""
    n = min(length, len(trace))
    return replace(
        trace, tokens=trace.tokens[:n], drafts=trace.drafts[:n], signals=trace.signals[:n], budget=n, finish="length",
        accepted=np.minimum(trace.accepted[:n], np.arange(n, 0, -1)).astype(trace.accepted.dtype),
        lookups=None if trace.lookups is None else trace.lookups[:n],
    )  # fmt: skip


def predict(config: LoadConfig, summary: dict[str, Any]) -> None:
    """Add to the rows of a cell's summary the tokens per second that the simulator predicts."""
    costs, traces = calibration(config.calibrated, summary["method"], summary["dtype"])
    tokens = answers(config)
    traces = [cut(trace, tokens.get(trace.prompt_id, len(trace))) for trace in traces]
    rows = max(int(n) for n in config.concurrency)
    looks_up = summary["method"] == "ngram"
    places = list(dict.fromkeys((row["loop"], row["load"]) for row in summary["rows"]))
    for contender in dict.fromkeys(row["contender"] for row in summary["rows"]):
        engine = Engine("modelled", summary["dtype"], summary["method"], looks_up, config.most_drafts, rows)
        fleet = Fleet(spec(contender, summary["table"]), engine, costs)
        if contender.startswith(WARM):
            for place in places:
                fleet.serve(traces, _load(config, *place), 98)
        found = {
            place: [fleet.serve(traces, _load(config, *place), repeat).throughput for repeat in range(config.repeats)]
            for place in places
        }
        for row in summary["rows"]:
            if row["contender"] == contender:
                row["predicted"] = median(found[row["loop"], row["load"]])


def _load(config: LoadConfig, loop: str, load: float) -> Load:
    if loop == "closed":
        return Load(config.requests + 4 * int(load), concurrency=int(load))
    return Load(config.requests + 8, rate=load)
