"""Fit the hybrid drafter's gate to exact traces of a draft model, and report how often each way to draft is right.

Prints, per level and for all of them, the share of positions at which the model alone, the n-gram lookup alone, the
better of the two (in hindsight) and the hybrid propose the target's own token, on prompts that the gate was not fitted
to, and with a cost table the modelled tokens per second of the best fixed gamma. Writes the gate and its card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import launch, option
from speckv_online.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from speckv_online.simulate.cost_table import CostTable
    from speckv_online.traces.trace import Trace
    from speckv_online.training.gate import Positions

GAMMAS = range(17)


@dataclass(frozen=True)
class GateConfig:
    """Settings of ``python -m experiments.gate``."""

    traces: str = option("", "directory of traces of the draft model to fit to")
    test: str = option("", "directory of traces of other prompts to judge on (default: cross-validate over prompts)")
    levels: tuple[str, ...] = option((), "compression levels, comma separated (default: all there are)")
    costs: tuple[str, ...] = option((), "cost tables for the modelled part: files or built-in names, comma separated")
    skips: tuple[str, ...] = option(
        ("0.6", "0.8", "1"), "also judge: how sure the lookup has to be for the model not to be asked (1: it always is)"
    )
    out: str = option("runs/gate/gate-smollm2.npz", "file of the gate; its card is written beside it")

    def __post_init__(self) -> None:
        if not self.traces:
            raise UserError("--traces is missing: collect some with python -m experiments.profile --split train")
        try:
            good = all(0 < float(s) <= 1 for s in self.skips)
        except ValueError:
            good = False
        if not good or not self.skips:
            raise UserError(f"--skips must be probabilities above 0, up to 1, got {','.join(self.skips)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(run, GateConfig, argv)


def run(config: GateConfig) -> int:
    """Fit, judge, print, save."""
    from speckv_online.io.manifest import git_state, now
    from speckv_online.simulate.cost_table import load_cost
    from speckv_online.traces.trace import load_traces
    from speckv_online.training.gate import choose, cross_fit, fit_gate, positions, prompts_of, rates, tune_skip

    train = load_traces(config.traces, levels=config.levels)
    held_out = load_traces(config.test, levels=config.levels) if config.test else train
    if config.test and (both := prompts_of(train) & prompts_of(held_out)):
        raise UserError(f"{len(both)} prompts are in --traces and in --test, e.g. {min(both)}: judge on others")
    costs = [load_cost(spec) for spec in config.costs]
    data = positions(train)
    gate = fit_gate(data)
    gate.skip = tune_skip(data)
    judged = positions(held_out) if config.test else data
    how = f"{len(prompts_of(held_out))} held-out prompts" if config.test else "10-fold cross-validation over prompts"
    skips = sorted({f"{gate.skip:g}", *config.skips})
    chosen = {s: choose(gate, judged, float(s)) if config.test else cross_fit(data, float(s)) for s in skips}
    levels = sorted({t.level for t in held_out})

    print(f"fitted to {int(data.decisive.sum())} positions of {len(train)} traces; not asked from {gate.skip}")
    print(f"right per position, {how}:")
    card: dict[str, Any] = {"judged on": how, "right per position": {}}
    for level in [*levels, "all"]:
        rows = _rows(held_out, judged, level)
        for skip, (right, asked) in chosen.items():
            found = rates(judged.select(rows), right[rows], asked[rows])
            card["right per position"].setdefault(level, {})[f"skip {skip}"] = {
                k: round(v, 4) for k, v in found.items()
            }
            print(f"  {level}, skip {skip}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for cost in costs:
        for line in modelled(held_out, judged, chosen, cost):
            print(line)
    card |= {
        "fitted to": f"{len(train)} traces, {len(prompts_of(train))} prompts, {len(data.found)} positions",
        "draft": sorted({str(t.meta.get("draft_fingerprint", "")) for t in train}),
        "git": git_state(),
        "made": now(),
    }
    gate.card.update(card)
    print(f"gate: {gate.save(Path(config.out).expanduser())}")
    return 0


def _rows(traces: Sequence[Trace], data: Positions, level: str) -> np.ndarray:
    import numpy as np

    return np.array([level in (t.level, "all") for t in traces])[data.trace]


def modelled(
    traces: Sequence[Trace],
    data: Positions,
    chosen: dict[str, tuple[np.ndarray, np.ndarray]],
    cost: CostTable,
) -> Iterator[str]:
    """Yield, per level, the best fixed gamma in hindsight of every way to draft and its modelled tokens per second."""
    import numpy as np

    from speckv_online.simulate.hindsight import by_level
    from speckv_online.training.gate import fixed_goodput

    yield f"modelled tokens/s with the costs {cost.name!r}, best fixed gamma in hindsight:"
    for level, group in by_level(traces).items():
        if level not in cost.levels:
            continue
        table, rows = cost.level(level), _rows(traces, data, level)
        part = data.select(rows)
        numbers = {number: i for i, number in enumerate(np.unique(part.trace).tolist())}
        part.trace[:] = [numbers[n] for n in part.trace.tolist()]
        always = np.ones(len(part.found), dtype=bool)
        ways = {"model": (part.model, always, always), "ngram": (part.lookup, ~always, part.found)}
        ways |= {f"hybrid, skip {s}": (right[rows], asked[rows], always) for s, (right, asked) in chosen.items()}
        found = []
        for name, (right, asked, offered) in ways.items():
            best = {g: fixed_goodput(group, part, right, asked, offered, g, table) for g in GAMMAS}
            gamma = max(best, key=lambda g: best[g])
            found.append(f"{name} {best[gamma]:.2f} (gamma {gamma})")
            plain = best[0]
        yield f"  {level}: no draft {plain:.2f}, " + ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
