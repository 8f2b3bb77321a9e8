"""What a run of :mod:`experiments.results` says: tables, bars and a plot, from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.documents import insert
from experiments.results.model_check import PLAIN, modelled_calls
from experiments.results.stalls import told, without_stalls
from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.io.manifest import describe
from speckv_online.io.run_directory import UnitResult, read_manifest, read_units
from speckv_online.reporting.plots import figure
from speckv_online.stats import Estimate, goodput, paired_ratio

MARKER = "measured"
FOUR, PRODUCT = "fixed:4", "online+hybrid"
PAPER = "mlp16:tokens_per_step"
THEIR_FOUR = "transformers:constant-4"
THEIRS = "transformers:"  # its schedules, without its plain decoding
AGREE = 0.05  # how far modelled goodput may be from measured


class Level:
    """The calls of one level, by contender and prompt."""

    def __init__(self, name: str, units: Sequence[UnitResult]) -> None:
        self.name = name
        kept, left_out = without_stalls(units)
        self.calls, self.all_calls = calls_of(kept), calls_of(units)
        self.left_out = told(name, left_out, len(units))
        self.modelled = modelled_calls(kept)

    @property
    def shared(self) -> list[str]:
        """Prompts that all contenders decoded."""
        return sorted(set.intersection(*(set(calls) for calls in self.calls.values())))

    def goodput(self, name: str, prompts: Sequence[str] | None = None) -> float:
        """Tokens per second of whole calls, over all of the contender's prompts or some."""
        calls = self.calls[name]
        return goodput(*np.reshape([calls[p] for p in (calls if prompts is None else prompts)], (-1, 2)).T)

    def ratio(
        self, name: str, base: str, prompts: Sequence[str] | None = None, *, stalled: bool = False
    ) -> Estimate | None:
        """Goodput over that of another contender, on the prompts that both decoded, or some; None where there are none.

        With ``stalled``, calls in which the machine stood still are in it too.
        """
        found = self.all_calls if stalled else self.calls
        a, b = found[name], found[base]
        both = [p for p in (a if prompts is None else prompts) if p in b]
        if not both:
            return None
        columns = [np.array(x) for calls in (a, b) for x in zip(*(calls[p] for p in both), strict=True)]
        return paired_ratio(*columns)

    def best(self, prefix: str) -> str:
        """The contender of a family with the highest goodput in hindsight, on as many prompts as can be compared."""
        names = [n for n in self.calls if n.startswith(prefix) and "+" not in n]
        if prefix == "fixed" and PLAIN in self.calls:
            names.append(PLAIN)
        if not names:
            raise KeyError(prefix)
        names.sort(key=lambda n: -len(self.calls[n]))  # those with fewer prompts have to beat the others on theirs
        best = names[0]
        for name in names[1:]:
            if (found := self.ratio(name, best)) is not None and found.value > 1:
                best = name
        return best

    def modelled_over_measured(self, name: str) -> Estimate | None:
        """Goodput by the cost model over that by the clock, on the same calls; None for what is not modelled."""
        seconds, calls = self.modelled.get(name, {}), self.calls[name]
        if not seconds:
            return None
        tokens, clock = zip(*(calls[p] for p in seconds), strict=True)
        return paired_ratio(tokens, list(seconds.values()), tokens, clock)


def calls_of(units: Sequence[UnitResult]) -> dict[str, dict[str, tuple[int, float]]]:
    """Return (tokens, seconds) of every call, by contender and prompt."""
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for u in units:
        call = len(u.facts["output"]), float(u.facts["call_seconds"])
        found.setdefault(u.unit.policy, {})[u.unit.prompt] = call
    return found


def levels_of(path: Path, leading: Sequence[str] = (), levels: Sequence[str] = ()) -> list[Level]:
    """Read a run directory, all levels or some.

    Prompts that a leading contender has not decoded at every one of them yet are left out.
    """
    groups: dict[str, list[UnitResult]] = {}
    for unit in read_units(path):
        if not levels or unit.unit.level in levels:
            groups.setdefault(unit.unit.level, []).append(unit)
    for name in leading:
        of = [{u.unit.prompt for u in units if u.unit.policy == name} for units in groups.values()]
        done = set.intersection(*of) if of else set()
        groups = {level: [u for u in units if u.unit.prompt in done] for level, units in groups.items()}
    if not groups or not all(groups.values()):
        raise UserError(f"{path} holds no prompt yet that all leading contenders have decoded at every level")
    return [Level(name, units) for name, units in groups.items()]


def publish(path: Path, doc: str, plot: str, leading: Sequence[str] = (), levels: Sequence[str] = ()) -> str:
    """Write ``results.md`` and the plot, and put the text into a document; return the text."""
    found = levels_of(path, leading, levels)
    text = document(found, read_manifest(path))
    write_atomically(path / "results.md", lambda f: f.write(text))
    png = figure(draw, found, size=(7.5, 6.0))
    write_atomically(Path(plot) if plot else path / "results.png", lambda f: f.write(png), binary=True)
    if doc:
        insert(Path(doc), text, MARKER)
    return text


def document(levels: Sequence[Level], manifest: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        "All figures are `measured`: tokens over the seconds of whole calls, prompt included, greedy decoding, "
        "held-out prompts, contenders interleaved prompt by prompt in one process. Intervals are 95 %, by bootstrap "
        "over prompts. *Hindsight* marks what was picked on the outcomes that it is scored on. Ratios are over the "
        "prompts that both decoded. Only the last column is `modelled`: by costs of fixed γ on other prompts.",
        "",
        describe(manifest),
        "",
    ]
    lines += bars(levels)
    if any(level.left_out for level in levels):
        lines += ["", "Left out, for whichever contender it was:", ""]
        lines += [level.left_out for level in levels if level.left_out]
        said = [
            f"`{n}` over {PLAIN} {level.name} {ratio.value:.3f}"
            for level in levels
            for n in ("online", PRODUCT)
            if level.left_out
            and {n, PLAIN} <= level.all_calls.keys()
            and (ratio := level.ratio(n, PLAIN, stalled=True))
        ]
        lines += ["", f"With them: {', '.join(said)}."] if said else []
    for level in levels:
        lines += ["", *table(level)]
    return "\n".join(lines) + "\n"


def names_of(level: Level) -> list[str]:
    """Contenders, fastest last within transformers and within ours."""
    return sorted(level.calls, key=lambda n: (not n.startswith("transformers"), level.goodput(n)))


def table(level: Level) -> list[str]:
    """One level's table."""
    best, theirs, shared = level.best("fixed"), level.best("transformers"), level.shared
    uneven = any(len(calls) > len(shared) for calls in level.calls.values())
    heads = ["contender", "prompts", "tokens/s", *([f"on the {len(shared)} prompts of all"] if uneven else [])]
    heads += ["× autoregressive", "× best fixed γ (*hindsight*)", "× `fixed:4`", "× transformers constant-4"]
    heads += ["modelled ÷ measured"]
    lines = [
        f"### {level.name}",
        "",
        f"Best fixed gamma in hindsight: `{best}`. Best of transformers in hindsight: `{theirs}`.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for name in names_of(level):
        cells = [f"`{name}`", str(len(level.calls[name])), f"{level.goodput(name):.2f}"]
        if uneven:
            cells.append(f"{level.goodput(name, shared):.2f}" if shared else "")
        for base in (PLAIN, best, FOUR, THEIR_FOUR):
            cells.append(show(level.ratio(name, base) if base in level.calls else None))
        cells.append(show(level.modelled_over_measured(name)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def show(ratio: Estimate | None) -> str:
    """A ratio as a table's cell."""
    return ratio.text(3) if ratio else ""


def bars(levels: Sequence[Level]) -> list[str]:
    """What was claimed beforehand, and what came out."""
    lines = ["| claim | wanted | found | |", "|---|---:|---:|---|"]

    def add(text: str, wanted: float, ratios: Sequence[Estimate | None]) -> None:
        values = [ratio.value for ratio in ratios if ratio]
        if len(values) < len(ratios):  # no prompt is left that both decoded
            lines.append(f"| {text} | {wanted} | | |")
            return
        found = float(np.exp(np.mean(np.log(values))))
        lines.append(f"| {text} | {wanted} | {found:.3f} | {'pass' if found >= wanted else '**fail**'} |")

    have = set.intersection(*(set(level.calls) for level in levels))
    for policy in {"online"} & have:
        for level in levels if PLAIN in have else ():
            add(f"`{policy}` over autoregressive, {level.name}", 0.97, [level.ratio(policy, PLAIN)])
            over = level.ratio(policy, level.best("fixed"))
            add(f"`{policy}` over the best fixed γ in hindsight, {level.name}", 0.97, [over])
        for base, wanted in ((PLAIN, 1.25), ("mlp16", 1.15), (FOUR, 1.15), (PAPER, 1.3)):
            if base in have:
                found = [level.ratio(policy, base) for level in levels]
                add(f"`{policy}` over `{base}`, geometric mean", wanted, found)
    if PRODUCT in have and THEIR_FOUR in have:
        found = [level.ratio(PRODUCT, THEIR_FOUR) for level in levels]
        add("the product over transformers' constant-4, geometric mean", 1.4, found)
        found = [level.ratio(PRODUCT, level.best("transformers")) for level in levels]
        add("the product over transformers' best, plain decoding included, geometric mean", 1.3, found)
    if PRODUCT in have and PLAIN in have:
        for level in levels:
            add(f"the product over autoregressive decoding, {level.name}", 1.0, [level.ratio(PRODUCT, PLAIN)])
    return lines + agreements(levels)


def agreements(levels: Sequence[Level]) -> list[str]:
    """One row a level: the contender whose modelled goodput is farthest from the measured one."""
    lines = []
    for level in levels:
        found = {n: e.value for n in level.calls if (e := level.modelled_over_measured(n)) is not None}
        if found:
            worst = max(found, key=lambda n: abs(np.log(found[n])))
            within = sum(abs(v - 1) <= AGREE for v in found.values())
            verdict = "pass" if within == len(found) else f"**fail**, {within} of {len(found)} within"
            text = f"modelled over measured goodput, {level.name}, farthest off: `{worst}`"
            lines.append(f"| {text} | {1 - AGREE} to {1 + AGREE} | {found[worst]:.3f} | {verdict} |")
    return lines


def draw(axes: Any, levels: Sequence[Level]) -> None:
    """Goodput over plain decoding in our decoder, with intervals: a row for each contender, a colour for each level."""
    names = [n for n in levels[0].calls if all(n in level.calls and PLAIN in level.calls for level in levels)]
    ratios = {n: [e for level in levels if (e := level.ratio(n, PLAIN))] for n in names}
    names = [n for n in names if len(ratios[n]) == len(levels)]
    names.sort(key=lambda n: np.mean([np.log(e.value) for e in ratios[n]]))
    for i, level in enumerate(levels):
        place = np.arange(len(names)) + (len(levels) - 1 - 2 * i) / (2 * len(levels)) * 0.6
        found = [ratios[n][i] for n in names]
        axes.hlines(place, [e.low for e in found], [e.high for e in found], color=f"C{i}", linewidth=1)
        axes.plot([e.value for e in found], place, "o", color=f"C{i}", markersize=4, label=level.name)
    axes.axvline(1.0, color="0.7", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("tokens/s, relative to decoding without a draft (measured)")
    axes.legend(frameon=False, loc="lower right")
