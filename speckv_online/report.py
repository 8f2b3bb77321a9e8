"""A run's report, from the files of its directory alone: table, plain verdict, Markdown, JSON and a plot.

Every figure here comes from a clock and is labelled ``measured``. Nothing of torch or Ray is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speckv_online.errors import UserError
from speckv_online.files import write_atomically
from speckv_online.manifest import describe
from speckv_online.rundir import UnitResult, read_manifest, read_units
from speckv_online.stats import Estimate, bootstrap_goodput, paired_ratio
from speckv_online.verdict import verdict

BASELINE = "autoregressive"


@dataclass(frozen=True)
class Row:
    """One policy at one compression level.

    Attributes
    ----------
    tokens_per_second : Estimate
        Σtokens/Σseconds of all steps, prefill left out.
    tokens_per_step, mean_gamma : float
        Tokens produced and tokens drafted, per step.
    acceptance : float
        Accepted over drafted tokens; NaN if nothing was drafted.
    speedup : Estimate or None
        Ratio of goodputs to autoregressive decoding, paired by prompt; None without that baseline.
    decision_microseconds : float
        Median time per step that the policy took to decide and to learn.
    prompts, tokens, steps : int
        What it rests on.
    same_output, compared : int
        How many outputs were compared with autoregressive decoding's, and how many were the same tokens.
    """

    level: str
    policy: str
    tokens_per_second: Estimate
    tokens_per_step: float
    acceptance: float
    mean_gamma: float
    speedup: Estimate | None
    decision_microseconds: float
    prompts: int
    tokens: int
    steps: int
    same_output: int
    compared: int


@dataclass(frozen=True)
class Report:
    """What a run showed; ``verdict`` is one plain sentence, ``notes`` are things a reader has to know."""

    rows: list[Row]
    verdict: str
    notes: list[str]
    manifest: dict[str, Any]
    kind: str = "measured"


def build_report(path: str | Path) -> Report:
    """Read a run directory and compute its report; raises :class:`UserError` if there is no finished unit."""
    manifest, units = read_manifest(path), read_units(path)
    if not units:
        raise UserError(f"{path} holds no finished prompt yet: continue the run first")
    groups: dict[tuple[str, str], list[UnitResult]] = {}
    for result in units:
        groups.setdefault((result.unit.level, result.unit.policy), []).append(result)
    wanted = manifest.get("config", {})
    levels = _order({level for level, _ in groups}, wanted.get("levels", []))
    policies = _order({policy for _, policy in groups}, wanted.get("policies", []))
    keys = [(level, policy) for level in levels for policy in policies if (level, policy) in groups]
    rows = [_row(level, policy, groups) for level, policy in keys]

    def ratio(level: str, a: str, b: str) -> Estimate | None:
        return _ratio(groups.get((level, a)), groups.get((level, b)))

    return Report(rows, verdict(rows, ratio), _notes(rows, manifest), manifest)


def write_report(path: str | Path) -> Report:
    """Build a run's report and write it as Markdown, JSON, HTML and ``plots/goodput.png`` next to its records."""
    from speckv_online.report_html import to_html  # it is made of this module's parts

    path, report = Path(path), build_report(path)
    write_atomically(path / "report.html", lambda f: f.write(to_html(report)))
    write_atomically(path / "report.md", lambda f: f.write(to_markdown(report)))
    write_atomically(path / "report.json", lambda f: f.write(json.dumps(to_json(report), indent=2) + "\n"))
    write_atomically(path / "plots" / "goodput.png", lambda f: plot(report, f), binary=True)
    return report


def to_text(report: Report) -> str:
    """Return the table, the verdict and the notes for a terminal."""
    table = [HEAD, *(cells(row) for row in report.rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    lines = [f"{report.kind} on {describe(report.manifest)}", ""]
    for i, row in enumerate(table):
        if i and row[0] != table[i - 1][0]:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        padded = [c.ljust(w) if j < 2 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, "", *(f"Note: {note}" for note in report.notes), report.verdict])


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    made_on = f"Figures are {report.kind}: {describe(report.manifest)}."
    lines = ["# Comparison of policies", "", report.verdict, "", made_on, ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * 2 + "---:|" * (len(HEAD) - 2)]
    for row in report.rows:
        texts = cells(row)
        if row.speedup is not None and math.isfinite(row.speedup.p_value) and row.policy != BASELINE:
            texts = (*texts[:6], f"{texts[6]}, {_p_value(row.speedup.p_value)}", *texts[7:])
        lines.append("| " + " | ".join(texts) + " |")
    lines += ["", *(f"- {note}" for note in report.notes), "", "![tokens per second](plots/goodput.png)", ""]
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as a dict for JSON; what is not a number there is null."""
    return _finite(asdict(report))


def plot(report: Report, file: Any) -> None:
    """Draw tokens per second by level and policy, with 95 % intervals, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = list(dict.fromkeys(row.level for row in report.rows))
    policies = list(dict.fromkeys(row.policy for row in report.rows))
    figure = Figure(figsize=(max(6.0, 1.2 + 0.45 * len(levels) * (len(policies) + 1)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(policies)
    for j, policy in enumerate(policies):
        found = [(levels.index(row.level), row.tokens_per_second) for row in report.rows if row.policy == policy]
        x = [i + (j - (len(policies) - 1) / 2) * width for i, _ in found]
        y = [e.value for _, e in found]
        axes.bar(x, y, width * 0.92, label=_short(policy), color=f"C{j}")
        for xi, (_, e) in zip(x, found, strict=True):
            if math.isfinite(e.low):
                axes.plot([xi, xi], [e.low, e.high], color="0.2", linewidth=1.2)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylabel(f"tokens per second ({report.kind})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=min(4, len(policies)), loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(file, format="png", dpi=150)


#: Column titles of the table.
HEAD = (
    "level", "policy", "tokens/s", "tokens/step", "acceptance", "mean γ", "speed-up [95 %]", "µs/decision"
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells as text, in the order of :data:`HEAD`."""
    s = row.speedup
    if s is None:
        speedup = "–"
    elif row.policy == BASELINE:
        speedup = "1"
    else:
        speedup = f"{s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" if math.isfinite(s.low) else f"{s.value:.2f} [–]"
    return (
        row.level,
        row.policy,
        f"{row.tokens_per_second.value:.2f}",
        f"{row.tokens_per_step:.2f}",
        "–" if math.isnan(row.acceptance) else f"{row.acceptance:.2f}",
        f"{row.mean_gamma:.2f}",
        speedup,
        f"{row.decision_microseconds:.0f}",
    )


def _row(level: str, policy: str, groups: dict[tuple[str, str], list[UnitResult]]) -> Row:
    results = groups[level, policy]
    steps = [step for result in results for step in result.steps]
    drafted = sum(s.drafted for s in steps)
    tokens, seconds = _by_prompt(results)
    base = groups.get((level, BASELINE))
    outputs = {(r.unit.prompt, r.unit.seed): r.facts.get("output") for r in base or []}
    compared = [r for r in results if policy != BASELINE and outputs.get((r.unit.prompt, r.unit.seed)) is not None]
    return Row(
        level=level,
        policy=policy,
        tokens_per_second=bootstrap_goodput(list(tokens.values()), list(seconds.values())),
        tokens_per_step=sum(s.produced for s in steps) / len(steps),
        acceptance=sum(s.accepted for s in steps) / drafted if drafted else math.nan,
        mean_gamma=drafted / len(steps),
        speedup=_ratio(results, base),
        decision_microseconds=float(np.median([s.decide_seconds for s in steps])) * 1e6,
        prompts=len(tokens),
        tokens=sum(s.produced for s in steps),
        steps=len(steps),
        same_output=sum(r.facts.get("output") == outputs[r.unit.prompt, r.unit.seed] for r in compared),
        compared=len(compared),
    )


def _by_prompt(results: Sequence[UnitResult]) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens and seconds of each prompt, all seeded orders together: the prompt is what is resampled."""
    tokens: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for r in results:
        tokens[r.unit.prompt] = tokens.get(r.unit.prompt, 0.0) + r.tokens
        seconds[r.unit.prompt] = seconds.get(r.unit.prompt, 0.0) + r.seconds
    return tokens, seconds


def _ratio(results: Sequence[UnitResult] | None, base: Sequence[UnitResult] | None) -> Estimate | None:
    """Ratio of goodputs over what both policies have decoded; None if that is nothing."""
    if not results or not base:
        return None
    shared = {(r.unit.prompt, r.unit.seed) for r in results} & {(r.unit.prompt, r.unit.seed) for r in base}
    if not shared:
        return None
    tokens, seconds = _by_prompt([r for r in results if (r.unit.prompt, r.unit.seed) in shared])
    base_tokens, base_seconds = _by_prompt([r for r in base if (r.unit.prompt, r.unit.seed) in shared])
    prompts = list(tokens)
    return paired_ratio(
        [tokens[p] for p in prompts], [seconds[p] for p in prompts],
        [base_tokens[p] for p in prompts], [base_seconds[p] for p in prompts],
    )  # fmt: skip


def _notes(rows: Sequence[Row], manifest: dict[str, Any]) -> list[str]:
    prompts, tokens = max(row.prompts for row in rows), sum(row.tokens for row in rows)
    notes = [f"Prompts: {prompts}; tokens decoded in all: {tokens}; intervals are bootstrapped over prompts."]
    if prompts < 2:
        notes.append("With a single prompt there is no interval, and nothing can be said about other prompts.")
    elif prompts < 10:
        notes.append("Intervals from fewer than ten prompts are too narrow: take them as a hint.")
    schedule = manifest.get("schedule", {})
    if schedule:
        notes.append(
            f"Levels ran {schedule.get('levels')}; threads per worker: {schedule.get('threads_per_worker')}, "
            f"cores: {schedule.get('cores')}."
        )
    notes += manifest.get("notes", [])
    for level, worker in manifest.get("workers", {}).items():
        notes.append(f"{level}: {worker.get('arithmetic')}, on {worker.get('device')}.")
    differing = [row for row in rows if row.same_output < row.compared]
    compared = sum(row.compared for row in rows)
    if differing:
        where = ", ".join(f"{r.level} {r.policy} {r.compared - r.same_output} of {r.compared}" for r in differing)
        notes.append(f"Outputs that differ from autoregressive decoding's: {where}; all others are the same tokens.")
    elif compared:
        notes.append(f"All {compared} outputs are the same tokens as autoregressive decoding's.")
    for level, worker in manifest.get("workers", {}).items():
        for policy, faults in worker.get("faults", {}).items():
            notes.append(f"{level}: policy {policy} failed and fell back {faults} times.")
    if manifest.get("status") != "finished":
        notes.append("The run is not finished.")
    return notes


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _order(found: set[str], wanted: Sequence[str]) -> list[str]:
    return [x for x in wanted if x in found] + sorted(found - set(wanted))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
