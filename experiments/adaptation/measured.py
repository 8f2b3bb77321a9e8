"""The same comparison on real models: all copies decode every prompt, and take turns in going first.

A cell settles by decoding training prompts. Every policy starts from the shipped weights, which were fitted to traces
of such prompts at all levels. The draft that was never met is a lookup in the context. Other seconds are those of
another machine: the copies settle on the traces that ship, with its times.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

from experiments.adaptation.cells import pairs
from experiments.adaptation.config import AdaptationConfig
from experiments.adaptation.contest import COLD, Tally, settled
from experiments.adaptation.replay import learn
from experiments.common.bundled_prompts import TASKS, bundled
from experiments.common.cached_cells import Cell
from experiments.drift.stage import SETTINGS, Models
from policies.base import Policy
from speckv_online.io.prompts import Prompt, choose, read_prompts
from speckv_online.simulate.cost_table import RTX3090_RELEASE, CostTable
from speckv_online.simulate.replay_scores import tell_costs

#: What was never met, by condition; a dash where it is the level itself.
WHATS = {"task": TASKS, "draft": ("ngram",), "costs": (RTX3090_RELEASE.name,), "long": ("code",)}


def cells(config: AdaptationConfig) -> list[Cell]:
    """Return all cells, level by level, so that a level's models are loaded once."""
    return [
        (key, config.pair, "measured", level, what)
        for level in config.levels
        for key in config.conditions
        for what in WHATS.get(key, ("",))
        if key != "level" or len(config.levels) > 1
    ]


def play(config: AdaptationConfig, cell: Cell) -> dict[str, Any]:
    """Settle, and decode one cell's prompts under all copies."""
    key, _, _, level, what = cell
    models, draft = _models(config), what if key == "draft" else "own"
    stream = [p for p in _prompts(config, "test") if key not in ("task", "long") or p.task == what]
    stream = choose(stream, min(config.prompts, len(stream)), config.seed)
    models.load(level)
    policies = settled(config.policy, config.seed, lambda p: _settle(p, config, models, cell))
    told = CostTable("calibration", {level: models.costs[level]})
    for name, policy in policies.items():
        if name == COLD or key == "level":
            tell_costs(policy, told, [level])
    met, tokens, steps, seconds = list[Prompt](), list[int](), list[int](), {name: list[float]() for name in policies}
    for i in count():
        if sum(tokens) >= config.tokens if key == "long" else i == len(stream):
            break
        prompt = stream[i % len(stream)]
        names = [*policies][i % len(policies) :] + [*policies][: i % len(policies)]
        found = {name: models.generate(policies[name], level, draft, prompt) for name in names}
        own = found[""]
        for name, one in found.items():  # rounding may tip a tie: then outputs are of different length
            seconds[name].append(one.decode_seconds * len(own.tokens) / len(one.tokens))
        met.append(prompt)
        tokens.append(len(own.tokens))
        steps.append(len(own.steps))
    sizes = tokens if key == "long" else steps
    tally = Tally(sum(sizes))
    tally.add([(p.task, p.id) for p in met], tokens, sizes, seconds)
    return tally.as_json()


def _settle(policy: Policy, config: AdaptationConfig, models: Models, cell: Cell) -> None:
    """Let a policy meet training prompts, what changes in the cell left out."""
    key, _, _, level, what = cell
    if key == "costs":
        traces = [t for own in pairs(config)[1].values() for t in own if t.level == level]
        return learn(policy, traces, RTX3090_RELEASE, config.seed)
    levels = [other for other in config.levels if other != level] if key == "level" else [level]
    for other in levels:
        models.load(other)
    tell_costs(policy, CostTable("calibration", models.costs), levels)
    pool = [p for p in _prompts(config, "train") if key != "task" or p.task != what]
    for i, prompt in enumerate(choose(pool, min(config.prompts, len(pool)), config.seed)):
        models.generate(policy, levels[i % len(levels)], "own", prompt)


def _prompts(config: AdaptationConfig, split: str) -> list[Prompt]:
    return [p for p in read_prompts(config.prompt_file) if p.split == split] if config.prompt_file else bundled(split)


@cache
def _models(config: AdaptationConfig) -> Models:
    return Models(**{name: getattr(config, name) for name in SETTINGS})
