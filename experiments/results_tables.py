"""What a run of :mod:`experiments.results` says: tables, bars and a plot, from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.replays import insert
from speckv_online.cost import fit_level
from speckv_online.errors import UserError
from speckv_online.files import write_atomically
from speckv_online.manifest import describe
from speckv_online.report_plots import figure
from speckv_online.rundir import UnitResult, read_manifest, read_units
from speckv_online.stats import Estimate, goodput, paired_ratio

MARKER = "measured"
PLAIN, FOUR, PRODUCT = "autoregressive", "fixed:4", "goodput+hybrid"
PAPER = "mlp16:tokens_per_step"
THEIR_FOUR = "transformers:constant-4"


class Level:
    """The calls of one level, by contender and prompt."""

    def __init__(self, name: str, units: Sequence[UnitResult]) -> None:
        self.name = name
        self.calls: dict[str, dict[str, tuple[int, float]]] = {}
        self.steps: dict[str, list[Any]] = {}
        for u in units:
            call = len(u.facts["output"]), float(u.facts["call_seconds"])
            self.calls.setdefault(u.unit.policy, {})[u.unit.prompt] = call
            self.steps.setdefault(u.unit.policy, []).extend(u.steps)
        # Fitted to our fixed gammas and plain decoding, and used for all contenders with that drafter.
        plain = [name for name in self.steps if name.partition(":")[0] in ("fixed", PLAIN) and "+" not in name]
        fixed = [step for name in plain for step in self.steps[name]]
        self.cost = fit_level(fixed) if any(step.drafted for step in fixed) else None

    def goodput(self, name: str, prompts: Sequence[str] | None = None) -> float:
        """Tokens per second of whole calls, over all of the contender's prompts or some."""
        calls = self.calls[name]
        return goodput(*zip(*(calls[p] for p in prompts or calls), strict=True))

    def ratio(self, name: str, base: str) -> Estimate:
        """Goodput over that of another contender, on the prompts that both decoded."""
        a, b = self.calls[name], self.calls[base]
        both = [p for p in a if p in b]
        columns = [np.array(x) for calls in (a, b) for x in zip(*(calls[p] for p in both), strict=True)]
        return paired_ratio(*columns)

    def best(self, prefix: str) -> str:
        """The contender with the highest goodput in hindsight among those of a family, on all prompts."""
        names = [n for n in self.calls if (n.partition(":")[0] == prefix or n == prefix) and "+" not in n]
        if prefix == "fixed" and PLAIN in self.calls:
            names.append(PLAIN)
        shared = set.intersection(*(set(self.calls[n]) for n in names))
        return max(names, key=lambda n: self.goodput(n, sorted(shared)))

    def modelled_over_measured(self, name: str) -> float:
        """Goodput of the steps by the fitted costs, over that by the clock; NaN without steps of the model drafter."""
        steps = self.steps.get(name, [])
        if self.cost is None or not steps or "+" in name:
            return float("nan")
        # A prompt's first step also reads the prompt for the draft.
        rest = [s for s in steps if s.step > 0]
        modelled = sum(self.cost.seconds(s.drafted, context=s.context_length) for s in rest)
        return sum(s.seconds for s in rest) / modelled


def levels_of(path: Path) -> list[Level]:
    """Read a run directory."""
    groups: dict[str, list[UnitResult]] = {}
    for unit in read_units(path):
        groups.setdefault(unit.unit.level, []).append(unit)
    if not groups:
        raise UserError(f"{path} holds no finished calls yet")
    return [Level(name, units) for name, units in groups.items()]


def publish(path: Path, doc: str, plot: str) -> str:
    """Write ``results.md`` and the plot, and put the text into a document; return the text."""
    levels = levels_of(path)
    text = document(levels, read_manifest(path))
    write_atomically(path / "results.md", lambda f: f.write(text))
    png = figure(draw, levels, size=(8.5, 4.2))
    write_atomically(Path(plot) if plot else path / "results.png", lambda f: f.write(png), binary=True)
    if doc:
        insert(Path(doc), text, MARKER)
    return text


def document(levels: Sequence[Level], manifest: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        "All figures are `measured`: tokens over the seconds of whole calls, prompt included, greedy decoding, "
        "held-out prompts, contenders interleaved prompt by prompt in one process. Intervals are 95 %, by bootstrap "
        "over prompts. *Hindsight* marks what was picked on the outcomes that it is scored on.",
        "",
        describe(manifest),
        "",
    ]
    lines += bars(levels)
    for level in levels:
        lines += ["", *table(level)]
    return "\n".join(lines) + "\n"


def names_of(level: Level) -> list[str]:
    """Contenders, fastest last within transformers and within ours."""
    return sorted(level.calls, key=lambda n: (not n.startswith("transformers"), level.goodput(n)))


def table(level: Level) -> list[str]:
    """One level's table."""
    best, theirs = level.best("fixed"), level.best("transformers")
    lines = [
        f"### {level.name}",
        "",
        f"Best fixed gamma in hindsight: `{best}`. Best of transformers in hindsight: `{theirs}`.",
        "",
        "| contender | prompts | tokens/s | × autoregressive | × best fixed γ (*hindsight*) | × `fixed:4` | "
        "× transformers constant-4 | modelled ÷ measured |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names_of(level):
        cells = [f"`{name}`", str(len(level.calls[name])), f"{level.goodput(name):.2f}"]
        for base in (PLAIN, best, FOUR, THEIR_FOUR):
            cells.append(show(level.ratio(name, base)) if base in level.calls else "")
        model = level.modelled_over_measured(name)
        cells.append(f"{model:.3f}" if model == model else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def show(e: Estimate) -> str:
    """A ratio with its interval."""
    return f"{e.value:.3f} [{e.low:.2f}, {e.high:.2f}]"


def bars(levels: Sequence[Level]) -> list[str]:
    """What was claimed beforehand, and what came out."""
    lines = ["| claim | wanted | found | |", "|---|---:|---:|---|"]

    def add(text: str, wanted: float, values: Sequence[float]) -> None:
        found = float(np.exp(np.mean(np.log(values))))
        lines.append(f"| {text} | {wanted} | {found:.3f} | {'pass' if found >= wanted else '**fail**'} |")

    have = set.intersection(*(set(level.calls) for level in levels))
    for policy in [p for p in ("goodput", "online") if p in have]:
        for level in levels if PLAIN in have else ():
            add(f"`{policy}` over autoregressive, {level.name}", 0.97, [level.ratio(policy, PLAIN).value])
            over = level.ratio(policy, level.best("fixed")).value
            add(f"`{policy}` over the best fixed γ in hindsight, {level.name}", 0.97, [over])
        for base, wanted in ((FOUR, 1.15), (PAPER, 1.3)):
            if base in have:
                values = [level.ratio(policy, base).value for level in levels]
                add(f"`{policy}` over `{base}`, geometric mean", wanted, values)
    if PRODUCT in have and THEIR_FOUR in have:
        values = [level.ratio(PRODUCT, THEIR_FOUR).value for level in levels]
        add("the product over transformers' constant-4, geometric mean", 1.4, values)
        values = [level.ratio(PRODUCT, level.best("transformers")).value for level in levels]
        add("the product over transformers' best, plain decoding included, geometric mean", 1.3, values)
    if PRODUCT in have and PLAIN in have:
        for level in levels:
            add(f"the product over autoregressive decoding, {level.name}", 1.0, [level.ratio(PRODUCT, PLAIN).value])
    return lines


def draw(axes: Any, levels: Sequence[Level]) -> None:
    """Bars of tokens per second by contender and level."""
    names = [n for n in names_of(levels[0]) if all(n in level.calls for level in levels)]
    wide = 0.8 / len(levels)
    for i, level in enumerate(levels):
        place = np.arange(len(names)) + (i - (len(levels) - 1) / 2) * wide
        axes.bar(place, [level.goodput(n) for n in names], wide, label=level.name)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("tokens/s (measured)")
    axes.legend(frameon=False)
