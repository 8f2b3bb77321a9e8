"""What a report says, computed from the files of a run directory alone: nothing of torch or Ray is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speckv_online.errors import UserError
from speckv_online.io.run_directory import UnitResult, read_manifest, read_units
from speckv_online.modeling.engine import EngineStatus
from speckv_online.reporting.rows import Row
from speckv_online.reporting.series import (
    Gain,
    Modelled,
    Regret,
    Reliability,
    Shares,
    gains,
    modelled,
    regrets,
    reliability,
    shares,
)
from speckv_online.reporting.verdict import BASELINE, advice, learning, verdict
from speckv_online.stats import Estimate, bootstrap_goodput, paired_ratio

#: The finished units of each (level, policy), in the order in which they were written.
Groups = dict[tuple[str, str], list[UnitResult]]


@dataclass(frozen=True)
class Report:
    """What a run showed.

    Attributes
    ----------
    rows : list of Row
    verdict : str
        One plain sentence on the whole run.
    notes : list of str
        Things that a reader has to know.
    manifest : dict
    kind : str
        ``measured``: every figure comes from a clock, but for ``modelled``, which says so.
    name : str
        Name of the run directory.
    advice : list of str
        One sentence per level that a reader can act on.
    learning : list of str
        Whether learning pays: one sentence for each policy that learns.
    regret, gain, shares, reliability, modelled : list
        See :mod:`speckv_online.reporting.series`.
    """

    rows: list[Row]
    verdict: str
    notes: list[str]
    manifest: dict[str, Any]
    kind: str = "measured"
    name: str = ""
    advice: list[str] = field(default_factory=list)
    learning: list[str] = field(default_factory=list)
    regret: list[Regret] = field(default_factory=list)
    gain: list[Gain] = field(default_factory=list)
    shares: list[Shares] = field(default_factory=list)
    reliability: list[Reliability] = field(default_factory=list)
    modelled: list[Modelled] = field(default_factory=list)

    @property
    def levels(self) -> list[str]:
        """The levels that it has rows of, in their order."""
        return list(dict.fromkeys(row.level for row in self.rows))


def build_report(path: str | Path, manifest: dict[str, Any] | None = None) -> Report:
    """Read a run directory and compute its report; raises :class:`UserError` if there is no finished unit.

    A manifest that could not be written there may be given.
    """
    manifest, every = manifest if manifest is not None else read_manifest(path), read_units(path)
    units = [result for result in every if result.steps]
    if not units:
        raise UserError(f"{path} holds no finished prompt yet: continue the run first")
    found: Groups = {}
    for result in units:
        found.setdefault((result.unit.level, result.unit.policy), []).append(result)
    wanted = manifest.get("config", {})
    levels = _order({level for level, _ in found}, wanted.get("levels", []))
    policies = _order({policy for _, policy in found}, wanted.get("policies", []))
    groups: Groups = {
        (level, policy): found[level, policy] for level in levels for policy in policies if (level, policy) in found
    }
    rows = [_row(level, policy, groups) for level, policy in groups]

    def ratio(level: str, a: str, b: str) -> Estimate | None:
        return _ratio(groups.get((level, a)), groups.get((level, b)))

    return Report(
        rows, verdict(rows, ratio), _notes(rows, manifest) + _left_out(every), manifest,
        name=Path(path).resolve().name,
        advice=advice(rows, ratio),
        learning=learning(rows, ratio),
        regret=regrets(groups),
        gain=gains(groups),
        shares=shares(groups),
        reliability=reliability(groups),
        modelled=modelled(groups, manifest),
    )  # fmt: skip


def _row(level: str, policy: str, groups: Groups) -> Row:
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
        if quality := worker.get("quality"):
            notes.append(
                f"{level}: {quality['agreement']:.1%} of next tokens are those of {quality['reference']}; "
                f"KL {quality['kl_mean']:.2g} nats in the mean, {quality['kl_median']:.2g} in the median."
            )
        if engine := worker.get("engine"):
            said = (f"{role} {EngineStatus(**status)}" for role, status in engine.items())
            notes.append(f"{level}: CPU engine: {', '.join(said)}.")
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
    for level, reason in manifest.get("failed", {}).items():
        notes.append(f"Not everything was decoded at {level}: {reason}. What is missing is not in any figure here.")
    for policy, entry in manifest.get("given_up", {}).items():
        missing = f" {entry['units']} of its prompts are missing." if "units" in entry else ""
        notes.append(f"Policy {policy} was given up: {entry['reason']}.{missing}")
    if manifest.get("status") not in ("finished", "incomplete"):
        notes.append("The run is not finished.")
    return notes


def _left_out(units: Sequence[UnitResult]) -> list[str]:
    names = sorted({f"{r.unit.level} {r.unit.policy}" for r in units if not r.steps})
    return [f"Without step records, and so in no figure here: {', '.join(names)}."] if names else []


def _order(found: set[str], wanted: Sequence[str]) -> list[str]:
    return [x for x in wanted if x in found] + sorted(found - set(wanted))
