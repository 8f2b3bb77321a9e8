"""What the blocks came to: ratios of neighbouring blocks, and throughput against latency."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from experiments.load.config import NONE

#: Columns of the table, and what they are of.
COLUMNS = (
    "load", "contender", "tokens/s", "over none", "TPOT p50 ms", "TPOT p99 ms", "TTFT p50 ms", "TTFT p99 ms",
    "accepted", "γ", "predicted ÷ measured",
)  # fmt: skip


def summarise(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell's medians by load and contender, and each contender's ratio to no drafts in the same repetition."""
    rows = []
    places = list(dict.fromkeys((b["loop"], b["load"]) for b in cell["blocks"]))
    names = list(dict.fromkeys(b["contender"] for b in cell["blocks"]))
    for loop, load in places:
        for name in names:
            own = [b for b in cell["blocks"] if (b["loop"], b["load"], b["contender"]) == (loop, load, name)]
            row = {"loop": loop, "load": load, "contender": name}
            row |= {key: median(b[key] for b in own) for key in own[0] if key.endswith(("_ms", "throughput"))}
            row["failed"] = sum(b["failed"] for b in own)
            row["over_none"] = ratio(cell["blocks"], loop, load, name, NONE, "output_throughput")
            row["tpot_over_none"] = ratio(cell["blocks"], loop, load, name, NONE, "median_tpot_ms")
            rates = [b["spec_decode_acceptance_rate"] for b in own if "spec_decode_acceptance_rate" in b]
            row["acceptance"] = median(rates) if rates else None
            row["gamma"] = mean_gamma([b["counts"] for b in own]) if not name.isdigit() else float(name)
            row["policy_ms"] = policy_ms([b["counts"] for b in own])
            rows.append(row)
    return {"method": cell["method"], "dtype": cell["dtype"], "table": cell["table"], "rows": rows} | {
        "mean_over": {
            name: {other: mean_ratio(cell["blocks"], places, name, other) for other in names if other != name}
            for name in names
        }
    }


def ratio(blocks: Sequence[dict[str, Any]], loop: str, load: float, a: str, b: str, key: str) -> float | None:
    """Return the geometric mean, over repetitions, of one contender's figure over another's."""
    found = {
        (block["contender"], block["repeat"]): block[key]
        for block in blocks
        if (block["loop"], block["load"]) == (loop, load)
    }
    pairs = [(value, found[b, repeat]) for (name, repeat), value in found.items() if name == a and (b, repeat) in found]
    return geometric_mean([x / y for x, y in pairs]) if pairs else None


def mean_ratio(blocks: Sequence[dict[str, Any]], places: Sequence[tuple[str, float]], a: str, b: str) -> float | None:
    """Return the geometric mean over closed loads of the ratio of throughputs."""
    found = [ratio(blocks, loop, load, a, b, "output_throughput") for loop, load in places if loop == "closed"]
    kept = [value for value in found if value is not None]
    return geometric_mean(kept) if kept else None


def mean_gamma(counts: Sequence[dict[str, float]]) -> float | None:
    """Return the mean number of drafts that a policy chose; None where it does not say."""
    steps = total = 0.0
    for block in counts:
        for key, value in block.items():
            if m := re.fullmatch(r'steps\{.*gamma="(\d+)".*\}', key):
                steps, total = steps + value, total + value * int(m[1])
    return total / steps if steps else None


def policy_ms(counts: Sequence[dict[str, float]]) -> float | None:
    """Return what the plug-in took of a step, in milliseconds."""
    steps = sum(value for block in counts for key, value in block.items() if key.startswith("steps{"))
    return 1e3 * sum(block.get("policy_seconds", 0.0) for block in counts) / steps if steps else None


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a cell's table."""

    def show(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        [
            f"{row['load']:g} at a time" if row["loop"] == "closed" else f"{row['load']:g} per second",
            row["contender"], show(row["output_throughput"], 0), show(row["over_none"], 2),
            show(row["median_tpot_ms"], 1), show(row["p99_tpot_ms"], 1), show(row["median_ttft_ms"], 0),
            show(row["p99_ttft_ms"], 0), show(row["acceptance"], 0), show(row["gamma"], 1),
            show(row["predicted"] / row["output_throughput"] if "predicted" in row else None, 2),
        ]
        for row in summary["rows"]
    ]  # fmt: skip


def plot(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw throughput against latency: one line per contender, one point per number of requests at a time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(summaries), figsize=(6 * len(summaries), 4.5), squeeze=False)
    for axis, summary in zip(axes[0], summaries, strict=True):
        rows = [row for row in summary["rows"] if row["loop"] == "closed"]
        for name in dict.fromkeys(row["contender"] for row in rows):
            own = [row for row in rows if row["contender"] == name]
            x, y = [row["median_tpot_ms"] for row in own], [row["output_throughput"] for row in own]
            axis.plot(x, y, marker="o", label=name)
        axis.set(title=f"{summary['method']}, {summary['dtype']}", xlabel="ms per token (p50)", ylabel="tokens/s")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
