"""What the host does in a step: synchronisations, launches, and the policy's share.

On a GPU the counts come from torch's profiler, and the times between graph launches from its events. Without one there
are the clocks of the steps alone.
"""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench.gpu.models import FAMILIES, open_pair, record
from experiments.bench.gpu.settings import Stage
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.models.pairs import LoadedPair, chat_prompt
from speckv_online.profiling.calibration import WARM_UP

POLICIES = ("autoregressive", "fixed:4", "online")
LEVEL = "fp16"
#: Names of the profiler's events, by the beginning.
LAUNCH, GRAPH = ("cudaLaunchKernel", "cuLaunchKernel"), ("cudaGraphLaunch",)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(stage: Stage) -> None:
    """Look at each policy with the default pair."""
    with tempfile.TemporaryDirectory() as name:
        kind = FAMILIES[0] if stage.tiny else ""
        pair = stage.attempt(f"models at {LEVEL}", partial(open_pair, stage, LEVEL, kind, Path(name)))
    if pair is None:
        return
    prompt = chat_prompt(pair.tokenizer, WARM_UP)
    new = 16 if stage.tiny else 64
    if not stage.tiny:
        record(pair, len(prompt) + new + 32)
    for spec in POLICIES:
        row = stage.attempt(spec, partial(look, stage, pair, spec, prompt, new))
        if row is not None:
            stage.add("rows", {"policy": spec, **row})


def look(stage: Stage, pair: LoadedPair, spec: str, prompt: list[int], new: int) -> dict[str, Any]:
    """Return one policy's row; it has decoded the prompt once before."""
    decoder = SpeculativeDecoder(pair.drafter, policy=make_policy(spec), target=pair.target, level=LEVEL)
    decoder.generate(prompt, new, eos_ids=())
    steps = decoder.generate(prompt, new, eos_ids=()).steps[1:]  # the first one reads the prompt
    total = sum(s.seconds for s in steps)
    parts = {name: sum(getattr(s, f"{name}_seconds") for s in steps) / total for name in ("draft", "verify", "decide")}
    row = {
        "steps": len(steps), "seconds_per_step": total / len(steps),
        "shares": {**parts, "other": 1 - sum(parts.values())}, "drafted": sum(s.drafted for s in steps),
    }  # fmt: skip
    return row | (profiled(decoder, prompt, new) if stage.device.type == "cuda" else {})


def profiled(decoder: SpeculativeDecoder, prompt: list[int], new: int) -> dict[str, Any]:
    """Return what the profiler counts per step, and the host's own time from one graph launch to the next."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps = len(decoder.generate(prompt, new, eos_ids=()).steps)
        torch.cuda.synchronize()
    events = sorted(seen.events() or (), key=lambda event: event.time_range.start)
    graphs, waits = (
        [(e.time_range.start, e.time_range.end) for e in events if e.name.startswith(kinds)] for kinds in (GRAPH, WAITS)
    )
    gaps = [own / 1e3 for own in host_gaps(graphs, waits)]  # µs to ms
    count = {name: sum(e.name.startswith(kinds) for e in events) for name, kinds in
             (("launches", LAUNCH), ("graph_launches", GRAPH), ("synchronisations", WAITS))}  # fmt: skip
    found: dict[str, Any] = {f"{name}_per_step": value / steps for name, value in count.items()}
    quantiles = np.quantile(gaps, [0.1, 0.5, 0.9]).tolist() if gaps else []
    return found | {"ms_between_graphs": dict(zip(("p10", "p50", "p90"), quantiles, strict=False))}


def host_gaps(graphs: list[tuple[float, float]], waits: list[tuple[float, float]]) -> list[float]:
    """Return the time from the end of each launch to the next one's beginning in which the host did not wait.

    Launches and waits are given by beginning and end, and the waits do not overlap.
    """
    return [
        max(0.0, b - a - sum(max(0.0, min(b, end) - max(a, start)) for start, end in waits))
        for (_, a), (b, _) in pairwise(graphs)
    ]
