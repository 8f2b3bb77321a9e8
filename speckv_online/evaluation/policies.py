"""Policies in realised tokens per second: goodputs, ratios and intervals over prompts, and which gammas they chose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from speckv_online.io.tables import Table
from speckv_online.stats import RESAMPLES, bootstrap_goodput, paired_ratio

#: The customary fixed gamma, which ratios are taken to.
BASE = "fixed:4"


@dataclass
class Realised:
    """Tokens and seconds of one policy at one level, per prompt, and how often it chose each gamma.

    Attributes
    ----------
    kind : str
        ``policy``, ``matched`` for one whose speed is an estimate (see :mod:`speckv_online.evaluation.released`), or
        ``hindsight`` for what has seen the outcomes that it is scored on.
    tokens, seconds : dict of str to float
        By prompt.
    gammas : dict of int to float
        Steps by gamma.
    """

    level: str
    policy: str
    kind: str = "policy"
    tokens: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gammas: dict[int, float] = field(default_factory=dict)

    def add(self, prompt: str, tokens: float, seconds: float, gammas: Mapping[int, float] | None = None) -> None:
        """Add what was decoded of one prompt."""
        self.tokens[prompt] = self.tokens.get(prompt, 0.0) + tokens
        self.seconds[prompt] = self.seconds.get(prompt, 0.0) + seconds
        for gamma, count in (gammas or {}).items():
            self.gammas[gamma] = self.gammas.get(gamma, 0.0) + count

    def arrays(self, prompts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and seconds of some prompts, each of shape (prompts,)."""
        names = list(prompts)
        return np.array([self.tokens[p] for p in names]), np.array([self.seconds[p] for p in names])


def policy_tables(
    found: Sequence[Realised], tasks: Mapping[str, str], how: str, resamples: int = RESAMPLES
) -> list[Table]:
    """Compare policies within each level.

    Parameters
    ----------
    found : sequence of Realised
    tasks : mapping of str to str
        Task of each prompt.
    how : str
        Where the seconds come from, for the titles: ``measured ...`` or ``modelled ...``.
    resamples : int
        Bootstrap resamples of whole prompts.

    Returns
    -------
    list of Table
        Goodputs with 95 % intervals and ratios to ``fixed:4`` over the prompts that both have; ratios by task; shares
        of the gammas.
    """
    policies = Table(
        "policies",
        f"Realised tokens/s, {how}; 95 % intervals over prompts; ratio to {BASE} paired by prompt",
        ("level", "policy", "kind", "prompts", "tokens/s", "low", "high", "ratio", "ratio low", "ratio high", "p"),
    )
    cells = Table(
        "improvement", f"Tokens/s against {BASE} by task, {how}", ("level", "task", "policy", "improvement %"), digits=1
    )
    shares = Table("gamma_share", "Steps by gamma", ("level", "policy", "gamma", "share"))
    bases = {r.level: r for r in found if r.policy == BASE}
    for r in found:
        prompts = [p for p in sorted(r.seconds) if r.seconds[p] > 0]
        if not prompts:
            continue
        speed = bootstrap_goodput(*r.arrays(prompts), resamples=resamples)
        base = bases.get(r.level)
        both = [p for p in prompts if base is not None and p in base.seconds]
        ratio = [float("nan")] * 4
        if base is not None and both:
            e = paired_ratio(*r.arrays(both), *base.arrays(both), resamples=resamples)
            ratio = [e.value, e.low, e.high, e.p_value]
            for task in dict.fromkeys(tasks[p] for p in both):
                part = [p for p in both if tasks[p] == task]
                one = paired_ratio(*r.arrays(part), *base.arrays(part), resamples=1)
                cells.add(r.level, task, r.policy, 100 * (one.value - 1))
        policies.add(r.level, r.policy, r.kind, len(prompts), speed.value, speed.low, speed.high, *ratio)
        total = sum(r.gammas.values())
        for gamma in sorted(r.gammas):
            shares.add(r.level, r.policy, gamma, r.gammas[gamma] / total)
    return [policies, cells, shares]
