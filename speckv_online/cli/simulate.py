"""``speckv simulate``: replay policies on exact traces and compare them with each other and with hindsight.

All seconds are modelled: they come from a cost table. Every level is a contest of its own, see
:mod:`speckv_online.simulate.replay_scores`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speckv_online.console import say, split_specs
from speckv_online.errors import UserError
from speckv_online.io.tables import finite

DEFAULT = "autoregressive,fixed:4,mlp16,online"
MEASURED = "measured"
HEAD = (
    "level", "policy", "tokens/s", "tokens/step", "acceptance", "over γ 0 [95 %]", "over best fixed γ [95 %]",
    "of clairvoyant", "faults",
)  # fmt: skip


def add_arguments(parser: Any) -> None:
    """Declare the flags of ``speckv simulate``."""
    parser.add_argument("traces", metavar="TRACES", help="trace file, or a directory of traces")
    parser.add_argument("--policies", type=split_specs, default=split_specs(DEFAULT), metavar="A,B,…",
                        help=f"policies to replay, comma separated (default: {DEFAULT})")  # fmt: skip
    parser.add_argument("--cost", default=MEASURED, metavar="NAME_OR_FILE",
                        help="measured (cost.json beside the traces), rtx3090-release, or a file")  # fmt: skip
    parser.add_argument("--levels", type=split_specs, default=(), metavar="A,B,…", help="levels (default: all)")
    parser.add_argument("--split", choices=("train", "test", "all"), default="all", help="prompts (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeded orders of the prompts (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="DIR", help="write simulate.json and simulate.md there too")


def run(arguments: Any) -> None:
    """Run ``speckv simulate`` from parsed flags."""
    from policies.registry import make_policy
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import check_writable
    from speckv_online.simulate.cost_table import load_cost
    from speckv_online.simulate.hindsight import by_level
    from speckv_online.simulate.replay_scores import ReplayEvaluation, Score, play
    from speckv_online.traces.trace import load_traces

    if arguments.seeds < 1 or not arguments.policies:
        raise UserError("--seeds must be at least 1, and --policies must name at least one")
    for spec in arguments.policies:
        make_policy(spec)  # a typo should show before the replays
    traces = load_traces(
        arguments.traces, levels=arguments.levels, splits=() if arguments.split == "all" else (arguments.split,)
    )
    cost = load_cost(_cost_file(arguments.traces) if arguments.cost == MEASURED else arguments.cost)
    if arguments.out:
        check_writable(Path(arguments.out))
    contests: list[tuple[ReplayEvaluation, list[Score]]] = [
        (ReplayEvaluation(group, cost), []) for group in by_level(traces).values()
    ]
    for evaluation, scores in contests:
        for spec in arguments.policies:
            say(f"{evaluation.level}: {spec}, {arguments.seeds} x {len(evaluation.traces)} traces")
            scores.append(play(spec, evaluation.traces, cost, range(arguments.seeds)))
    rows = [row for evaluation, scores in contests for row in _rows(evaluation, scores)]
    facts = {"seconds": "modelled", "cost": {"name": cost.name, "source": cost.source}, "seeds": arguments.seeds}
    document = json.dumps(facts | {"traces": len(traces), "rows": rows})
    table = [HEAD, *(_cells(row) for row in rows)]
    if arguments.out:
        out = Path(arguments.out)
        write_atomically(out / "simulate.json", lambda f: f.write(document + "\n"))
        lines = [f"| {' | '.join(line)} |" for line in table]
        text = "\n".join([_title(facts, len(traces)), "", lines[0], "|---" * len(HEAD) + "|", *lines[1:]])
        write_atomically(out / "simulate.md", lambda f: f.write(text + "\n"))
    if arguments.json:
        print(document)
        return
    from speckv_online.reporting.report import text_table

    print("\n".join([_title(facts, len(traces)), "", *text_table(table)]))


def _cost_file(traces: str) -> Path:
    """The cost table that was measured with the traces."""
    folder = Path(traces) if Path(traces).is_dir() else Path(traces).parent.parent
    path = folder / "cost.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: give --cost rtx3090-release, or a file")
    return path


def _title(facts: dict[str, Any], traces: int) -> str:
    name, source = facts["cost"]["name"], facts["cost"]["source"]
    return (
        f"modelled: {traces} traces, seconds of the cost table {name}{f' ({source})' if source else ''}; "
        f"{facts['seeds']} orders; hindsight rows were picked on the outcomes that they are scored on"
    )


def _rows(evaluation: Any, scores: Sequence[Any]) -> list[dict[str, Any]]:
    found = []
    for s in (*scores, *evaluation.hindsight()):
        row = {"level": evaluation.level, "policy": s.name, "kind": s.kind, "note": s.note, "prompts": len(s.tokens)}
        row |= {"goodput": s.goodput, "tokens": s.tokens.sum(), "steps": s.steps, "drafted": s.drafted}
        row |= {"accepted": s.accepted, "proposed": s.proposed, "faults": s.faults, "orders": s.orders.tolist()}
        row |= {"over_plain": asdict(s.over(evaluation.plain)), "over_best_fixed": asdict(s.over(evaluation.best))}
        found.append(finite(row | {"of_clairvoyant": s.goodput / evaluation.clairvoyant.goodput}))
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    def ratio(estimate: dict[str, Any]) -> str:
        if estimate["low"] is None:
            return f"{estimate['value']:.3f}"
        return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"

    note = f" ({row['note']})" if row["note"] else ""
    mark = "" if row["kind"] == "policy" else " hindsight"
    return [
        row["level"],
        f"{row['policy']}{note}{mark}",
        f"{row['goodput']:.2f}",
        f"{row['tokens'] / row['steps']:.2f}",
        f"{row['accepted'] / row['drafted']:.2f}" if row["drafted"] else "–",
        ratio(row["over_plain"]),
        ratio(row["over_best_fixed"]),
        f"{row['of_clairvoyant']:.3f}",
        str(row["faults"]),
    ]
