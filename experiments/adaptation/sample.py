"""Pack a few exact traces into one small file that ships: ``python -m experiments.adaptation.sample``.

Signals are kept as half floats, so a replay may differ by a step from that of the traces that they were taken from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adaptation.config import SAMPLE
from experiments.common.trace_sources import check_traces
from experiments.config import launch, option
from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.traces.trace import Trace, agreement, load_traces

META = ("drafter", "lookup_weights", "draft_fingerprint")
#: Traces by pair, and by whether they are to be adapted to or settled on.
Sample = dict[tuple[str, str], list[Trace]]
MET, KNOWN = "met", "known"
ARRAYS = ("prompt", "tokens", "drafts", "signals")


@dataclass(frozen=True)
class SampleConfig:
    """Settings of ``python -m experiments.adaptation.sample``."""

    traces: tuple[str, ...] = option((), "traces to adapt to by pair, PAIR=DIRECTORY, comma separated")
    settled: tuple[str, ...] = option((), "traces to settle on by pair, PAIR=DIRECTORY, comma separated")
    prompts: int = option(2, "prompts of each task to adapt to; half as many to settle on")
    out: str = option(str(SAMPLE), "file to write")

    def __post_init__(self) -> None:
        check_traces(self.traces)
        check_traces(self.settled, "--settled")
        if self.prompts < 1:
            raise UserError("--prompts must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(sample, SampleConfig, argv)


def sample(config: SampleConfig) -> int:
    """Pack the last prompts of every task, none of them twice."""
    found: Sample = {}
    for role, named, count in (
        (MET, config.traces, config.prompts),
        (KNOWN, config.settled, (config.prompts + 1) // 2),
    ):
        for pair, path in (text.split("=", 1) for text in named):
            met = {t.prompt_id for t in found.get((pair, MET), ())}
            traces = [t for t in load_traces(path) if t.prompt_id not in met]
            ids = {
                task: sorted({t.prompt_id for t in traces if t.task == task})[-count:]
                for task in {t.task for t in traces}
            }
            found[pair, role] = [t for t in traces if t.prompt_id in ids[t.task]]
    size = pack(found, Path(config.out)).stat().st_size
    print(f"{sum(map(len, found.values()))} traces, {size / 1000:.0f} kB: {config.out}")
    return 0


def pack(traces: Sample, path: Path) -> Path:
    """Write traces into one file."""
    every = [(key, t) for key, own in traces.items() for t in own]
    heads = [
        {"key": key, "level": t.level, "task": t.task, "prompt_id": t.prompt_id, "split": t.split, "budget": t.budget,
         "finish": t.finish, "meta": {k: t.meta[k] for k in META if k in t.meta},
         "sizes": [len(t.prompt), len(t)]}
        for key, t in every
    ]  # fmt: skip
    arrays: dict[str, Any] = {name: np.concatenate([getattr(t, name).ravel() for _, t in every]) for name in ARRAYS}
    arrays = {n: a.astype(np.float16 if n == "signals" else np.int32) for n, a in arrays.items()}
    head = np.array(json.dumps({"gamma": every[0][1].gamma, "traces": heads}))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, lambda f: np.savez_compressed(f, head=head, **arrays), binary=True)


def unpack(path: Path) -> Sample:
    """Read what :func:`pack` wrote."""
    with np.load(path, allow_pickle=False) as file:
        head, arrays = json.loads(str(file["head"])), {name: file[name] for name in ARRAYS}
    found: Sample = {}
    gamma, at = head["gamma"], dict.fromkeys(ARRAYS, 0)
    for about in head["traces"]:
        (pair, role), (asked, length) = about.pop("key"), about.pop("sizes")
        parts = {}
        for name, shape in zip(ARRAYS, ((asked,), (length,), (length, gamma), (length, gamma, 4)), strict=True):
            size = int(np.prod(shape))
            parts[name] = arrays[name][at[name] : at[name] + size].reshape(shape)
            at[name] += size
        parts["signals"] = parts["signals"].astype(np.float32)
        found.setdefault((pair, role), []).append(
            Trace(**about, **parts, accepted=agreement(parts["drafts"], parts["tokens"]))
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
