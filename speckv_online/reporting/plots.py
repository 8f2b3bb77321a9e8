"""The charts of a report as PNG, small enough to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from speckv_online.reporting.data import Report
from speckv_online.reporting.series import GROUPS, Gain

DPI = 160


@dataclass(frozen=True)
class Chart:
    """One picture: file name without ending, the level it is about (or none), its title, how to read it, the PNG."""

    name: str
    level: str
    title: str
    caption: str
    png: bytes


def can_draw() -> bool:
    """Return whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def charts(report: Report) -> list[Chart]:
    """Draw everything that the report has data for; what is about all levels comes first.

    Without matplotlib there are no charts: a report's text and tables do without.
    """
    if not can_draw():
        return []
    kind = report.kind
    caption = f"{kind}; lines are 95 % intervals over prompts"
    found = [Chart("goodput", "", "Tokens per second", caption, figure(goodput, report))]
    if report.reliability:
        caption = (
            f"{kind}: steps grouped by their drafts' mean confidence; on the diagonal a draft is right as often as it "
            "is sure. Tokens after a rejection are in the confidence, but have no label"
        )
        found.append(Chart("calibration", "", "Calibration of the draft", caption, figure(_reliability, report)))
    for level in report.levels:
        if any(r.level == level and len(r.seconds) > 1 for r in report.regret):
            against = next(r.against for r in report.regret if r.level == level)
            caption = f"{kind}, against {against}, the fastest policy of this run here, known only in hindsight"
            found.append(Chart(f"regret-{level}", level, "Regret", caption, figure(_regret, report, level)))
        for gain in (g for g in report.gain if g.level == level and len(g.ratios) > 1):
            caption = f"{kind}: how many times as fast as {gain.against}, which never learns, over all prompts so far"
            name = f"gain-{level}-{_file(gain.policy)}"
            found.append(Chart(name, level, f"Gain of {gain.policy}", caption, figure(_gain, gain)))
        for s in (s for s in report.shares if s.level == level):
            name = f"gamma-{level}-{_file(s.policy)}"
            caption = f"{kind}: share of steps by drafted tokens, and the share of them accepted (line), over the steps"
            found.append(Chart(name, level, f"γ of {s.policy}", caption, figure(_shares, s)))
    return found


def goodput(axes: Any, report: Report) -> None:
    """Draw tokens per second by level and policy, as bars with their intervals."""
    levels, policies = report.levels, list(dict.fromkeys(row.policy for row in report.rows))
    width = 0.8 / len(policies)
    for j, policy in enumerate(policies):
        found = [(levels.index(row.level), row.tokens_per_second) for row in report.rows if row.policy == policy]
        x = [i + (j - (len(policies) - 1) / 2) * width for i, _ in found]
        axes.bar(x, [e.value for _, e in found], width * 0.92, label=short(policy), color=_colour(j))
        for xi, (_, e) in zip(x, found, strict=True):
            if math.isfinite(e.low):
                axes.plot([xi, xi], [e.low, e.high], color="0.2", linewidth=1.2)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylabel(f"tokens per second ({report.kind})")
    _legend(axes, len(policies))


def _regret(axes: Any, report: Report, level: str) -> None:
    curves = [r for r in report.regret if r.level == level]
    for j, r in enumerate(curves):
        label = f"{short(r.policy)} {r.seconds[-1]:.3g} s"
        axes.plot(range(1, len(r.seconds) + 1), r.seconds, label=label, color=_colour(j), linewidth=1.6)
    tops = sorted(max(r.seconds) for r in curves)
    if len(tops) > 2 and tops[-1] > 4 * tops[-2] > 0:  # one bad policy would press all others onto the axis
        low = min(min(r.seconds) for r in curves)
        axes.set_ylim(min(low, 0.0) - 0.1 * tops[-2], 2 * tops[-2])
    axes.set_xlabel("prompts decoded")
    axes.set_ylabel("seconds lost")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, len(curves), columns=2)


def _gain(axes: Any, gain: Gain) -> None:
    axes.plot(range(1, len(gain.ratios) + 1), gain.ratios, color=_colour(0), linewidth=1.6)
    axes.axhline(1.0, color="0.7", linewidth=1, linestyle="--")
    axes.set_xlabel("prompts decoded")
    axes.set_ylabel(f"speed / {short(gain.against)}")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _shares(axes: Any, s: Any) -> None:
    ramp = ("0.75", "#cfe1f2", "#93c4de", "#4b97c9", "#1f63a8", "#08306b")
    # Shares hold for a whole window, so its first and last value reach to the ends of the axis.
    x = [0.0, *s.steps, s.steps[-1] + s.steps[0]]
    rows = [[v[0], *v, v[-1]] for v in s.shares.values()]
    axes.stackplot(x, rows, labels=[f"γ {label}" for label, _ in GROUPS], colors=ramp)
    axes.plot(s.steps, s.acceptance, color="#d95f02", linewidth=1.4)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1)
    axes.set_xlabel("steps")
    axes.set_ylabel("share of steps; accepted (line)")
    _legend(axes, len(GROUPS))


def _reliability(axes: Any, report: Report) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for j, r in enumerate(report.reliability):
        axes.plot(r.confidence, r.accepted, marker="o", markersize=4, label=r.level, color=_colour(j))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("mean confidence of the step's drafts")
    axes.set_ylabel("accepted / tested tokens")
    _legend(axes, len(report.reliability))


def figure(draw: Callable[..., None], *arguments: Any, size: tuple[float, float] = (4.6, 3.3)) -> bytes:
    """Return what ``draw(axes, *arguments)`` draws as PNG; the size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots()
    draw(axes, *arguments)
    axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    made.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def short(name: str, most: int = 22) -> str:
    """Cut a policy's name to what fits a legend."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend(axes: Any, entries: int, columns: int = 3) -> None:
    axes.legend(
        frameon=False, fontsize="small", ncols=min(columns, entries), loc="lower left", bbox_to_anchor=(0, 1),
        handlelength=1.2, columnspacing=1.0, borderaxespad=0.2,
    )  # fmt: skip


def _colour(j: int) -> Any:
    import matplotlib as mpl

    palette: Sequence[Any] = mpl.colormaps["tab10" if j < 10 else "tab20b"].colors  # type: ignore[attr-defined]
    return palette[j % len(palette)]


def _file(policy: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in policy)
