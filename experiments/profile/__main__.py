"""Collect exact traces of a model pair, and a cost table.

Writes one trace per level and prompt (``LEVEL/PROMPT.npz``), the timed steps of the generations
(``steps-LEVEL.jsonl``) and a cost table fitted to them (``cost.json``). A run that was stopped goes on where it was:
traces that are there are not collected again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import launch
from experiments.profile.collect import (
    ProfileConfig,
    check_request,
    collect_level,
    request,
    select_prompts,
    timed_units,
)
from speckv_online.console import say
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive

if TYPE_CHECKING:
    from speckv_online.simulate.cost_table import CostTable
    from speckv_online.traces.trace import Trace


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(profile, ProfileConfig, argv)


def profile(config: ProfileConfig) -> int:
    """Collect what is missing, then write the tables."""
    from speckv_online.io.run_directory import check_writable
    from speckv_online.models.levels import get_level

    prompts, out = select_prompts(config), Path(config.out).expanduser()
    for level in config.levels:
        get_level(level)
    check_writable(out)
    with exclusive(out):
        check_request(request(config), out)
        before = timed_units(out)
        for level in config.levels:
            collect_level(config, level, prompts, out)
        write_tables(config, out, timed_units(out) != before)
    return 0


def write_tables(config: ProfileConfig, out: Path, measured: bool) -> None:
    """Write ``cost.json``, and print a summary.

    The cost table says where its steps were timed: of a run that timed none, that is what it said before.
    """
    from speckv_online.io import manifest
    from speckv_online.io.run_directory import read_units
    from speckv_online.simulate.cost_table import fit_cost, load_cost
    from speckv_online.traces.trace import load_traces

    traces = load_traces(out)
    timed: dict[str, list[Any]] = {}
    for unit in read_units(out):
        timed.setdefault(unit.unit.level, []).extend(unit.steps)
    facts = {"hardware": manifest.hardware(), "software": manifest.software(), "git": manifest.git_state()}
    facts["schedule"] = {"threads": config.threads or manifest.cores()}
    for level, steps in list(timed.items()):
        # First steps read the prompt and are no data; without a drafted token, nor one without, all times would be one.
        if len({s.drafted for s in steps if s.step > 0 and s.verify_seconds > 0}) < 2:
            del timed[level]
            say(f"{level}: too few timed steps for costs: collect more prompts or tokens, with gamma 0 and others")
    file = out / "cost.json"
    source, details = manifest.describe(facts), facts
    if not measured and file.exists():
        with suppress(UserError):  # what is no table says nothing
            earlier = load_cost(file)
            source, details = earlier.source, dict(earlier.details)
    cost = fit_cost(timed, "measured", source, details)
    if timed:
        cost.save(file)
    elif file.exists():
        say(f"{file} is of steps that are no longer there")
    for line in summary(traces, cost):
        print(line)
    print(f"traces: {out}" + f", costs: {file}" * bool(timed))


def summary(traces: list[Trace], cost: CostTable) -> Iterator[str]:
    """Describe traces in a line per level; seconds are modelled by the cost table, where that has the level."""
    from speckv_online.simulate.hindsight import best_fixed, by_level, clairvoyant

    for level, group in by_level(traces).items():
        tokens = sum(len(t) for t in group)
        first = sum(int((t.accepted > 0).sum()) for t in group)
        yield f"{level}: {len(group)} traces, {tokens} tokens, first draft token right at {first / tokens:.3f} of them"
        if level not in cost.levels:
            continue
        table, best = cost.level(level), best_fixed(group, cost)[level]
        oracle = clairvoyant(group, cost)[level].goodput
        verify = "/".join(f"{1e3 * table.verify_seconds[w - 1]:.0f}" for w in (1, 5, 9, 17))
        once, each = 1e3 * table.first_draft_seconds, 1e3 * table.draft_seconds
        yield f"  measured: draft {once:.1f} ms and {each:.1f} a token, verify of 1/5/9/17 tokens {verify} ms"
        yield (
            f"  modelled tokens/s: gamma 0 {best.all[0]:.2f}, best fixed gamma in hindsight ({best.gamma}) "
            f"{best.goodput:.2f}, clairvoyant {oracle:.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
