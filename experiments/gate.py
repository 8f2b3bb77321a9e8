"""Fit the hybrid drafter's gate to exact traces of a draft model, and report how often each way to draft is right.

Prints, per level and for all of them, the share of positions at which the model alone, the n-gram lookup alone, the
better of the two (in hindsight) and the hybrid propose the target's own token, on prompts that the gate was not fitted
to. Writes the gate and its card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import launch, option
from speckv_online.errors import UserError


@dataclass(frozen=True)
class GateConfig:
    """Settings of ``python -m experiments.gate``."""

    traces: str = option("", "directory of traces of the draft model to fit to")
    test: str = option("", "directory of traces of other prompts to judge on (default: cross-validate over prompts)")
    levels: tuple[str, ...] = option((), "compression levels, comma separated (default: all there are)")
    out: str = option("runs/gate/gate-smollm2.npz", "file of the gate; its card is written beside it")

    def __post_init__(self) -> None:
        if not self.traces:
            raise UserError("--traces is missing: collect some with python -m experiments.profile --split train")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(run, GateConfig, argv)


def run(config: GateConfig) -> int:
    """Fit, judge, print, save."""
    import numpy as np

    from speckv_online.io.manifest import git_state, now
    from speckv_online.traces.trace import load_traces
    from speckv_online.training.gate import choose, cross_fit, fit_gate, positions, prompts_of, rates, tune_skip

    train = load_traces(config.traces, levels=config.levels)
    held_out = load_traces(config.test, levels=config.levels) if config.test else train
    if config.test and (both := prompts_of(train) & prompts_of(held_out)):
        raise UserError(f"{len(both)} prompts are in --traces and in --test, e.g. {min(both)}: judge on others")
    data = positions(train)
    gate = fit_gate(data)
    gate.skip = tune_skip(data)
    judged = positions(held_out) if config.test else data
    how = f"{len(prompts_of(held_out))} held-out prompts" if config.test else "10-fold cross-validation over prompts"
    right, asked = choose(gate, judged, gate.skip) if config.test else cross_fit(data, gate.skip)

    print(f"fitted to {int(data.decisive.sum())} positions of {len(train)} traces; not asked from {gate.skip}")
    print(f"right per position, {how}:")
    card: dict[str, Any] = {"judged on": how, "right per position": {}}
    for level in [*sorted({t.level for t in held_out}), "all"]:
        rows = np.array([level in (t.level, "all") for t in held_out])[judged.trace]
        found = rates(judged.select(rows), right[rows], asked[rows])
        card["right per position"][level] = {name: round(value, 4) for name, value in found.items()}
        print(f"  {level}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    gate.card |= card | {
        "fitted to": f"{len(train)} traces, {len(prompts_of(train))} prompts, {len(data.found)} positions",
        "draft": sorted({str(t.meta.get("draft_fingerprint", "")) for t in train}),
        "git": git_state(),
        "made": now(),
    }
    print(f"gate: {gate.save(Path(config.out).expanduser())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
