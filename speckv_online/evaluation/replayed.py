"""Realised tokens by exact replay of traces, on prompts, tasks and levels that a policy's weights have not seen.

The tokens and steps are those of real greedy decoding; the seconds come from a cost table, so every speed here is
``modelled``. Hindsight baselines have seen what they are scored on and are labelled so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from policies.base import Policy
from policies.registry import make_policy
from speckv_online.evaluation.policies import Realised
from speckv_online.evaluation.predictors import HeldOut
from speckv_online.io.tables import Table
from speckv_online.simulate.cost_table import CostTable
from speckv_online.simulate.hindsight import best_fixed, by_level, clairvoyant
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Replay, Simulator, replay_fixed
from speckv_online.traces.trace import Trace
from speckv_online.training.mlp16 import Data
from speckv_online.training.step_table import Schedule, StepRow, replay_rows

FIXED = (0, 1, 2, 4, 6, 8)
#: Policies that start from MLP16: with the paper's objective, with tokens per second, and learning on.
FITTED = ("mlp16:tokens_per_step", "mlp16", "online")
#: Gammas that are labelled at each step start; a few are enough to score predictions.
LABELLED = (1, 2, 4, 8)


def steps_of(traces: Sequence[Trace], gammas: Sequence[int] = (2, 4, 6, 8)) -> list[StepRow]:
    """Replay traces at fixed gammas, as the release profiled; where the budget ends, gamma is what that leaves."""
    return [row for g in gammas for t in traces for row in replay_rows(t, Schedule((g,)), f"fixed:{g}")]


def speeds_by_gamma(traces: Sequence[Trace], cost: CostTable) -> Table:
    """Modelled tokens/s of every level, task and fixed gamma."""
    columns = ("level", "task", "gamma", "tokens/s")
    table = Table("speed_by_gamma", "Modelled tokens/s by gamma and task", columns, digits=2)
    for level, group in by_level(traces).items():
        for task in (*dict.fromkeys(t.task for t in group), "all"):
            part = [t for t in group if task in (t.task, "all")]
            for gamma, speed in best_fixed(part, cost, FIXED)[level].all.items():
                table.add(level, task, gamma, speed)
    return table


def fixed_policies(traces: Sequence[Trace], cost: CostTable) -> list[Realised]:
    """Replay every fixed gamma, and the best per level and per task and the clairvoyant oracle, in hindsight."""
    found = []
    for level, group in by_level(traces).items():
        table = cost.level(level)
        for gamma in FIXED:
            r = Realised(level, f"fixed:{gamma}" if gamma else "autoregressive")
            for trace in group:
                _add(r, trace, replay_fixed(trace, gamma, table))
            found.append(r)
        best = best_fixed(group, cost)[level].gamma
        by_task = {t: best_fixed([x for x in group if x.task == t], cost)[level].gamma for t in {x.task for x in group}}
        for name, choice in (("best fixed", dict.fromkeys(by_task, best)), ("best per task", by_task)):
            r = Realised(level, name, "hindsight")
            for trace in group:
                _add(r, trace, replay_fixed(trace, choice[trace.task], table))
            found.append(r)
        # The oracle's rate is that of the whole level; one trace at a time it would be another bound.
        r = Realised(level, "clairvoyant", "hindsight")
        for trace, part in zip(group, clairvoyant(group, cost)[level].split(), strict=True):
            _add(r, trace, part)
        found.append(r)
    return found


def fitted_policies(
    traces: Sequence[Trace],
    cost: CostTable,
    data: Data,
    fits: Mapping[str, HeldOut],
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> list[Realised]:
    """Replay policies whose weights were trained without the part that they are replayed on.

    Parameters
    ----------
    traces : sequence of Trace
    cost : CostTable
    data : Data
        Causal rows of the traces, which ``fits`` was made with.
    fits : mapping of str to HeldOut
    seed : int
        Seed of the prompts' order, which a policy that learns depends on, and of policies that randomise.
    """
    found: dict[tuple[str, str], Realised] = {}
    for split, held in fits.items():
        say(f"replaying with {split} held out")
        # Tasks and levels are held out one at a time; their parts add up to one row of the report.
        suffix = "" if split == "prompts" else f", {split.split(' ')[0]} held out"
        for out, weights in held.fits:
            parts = {(str(p), str(a)) for p, a in zip(data.prompt[out], data.level[out], strict=True)}
            for level, group in by_level(t for t in traces if (t.prompt_id, t.level) in parts).items():
                for spec in FITTED:
                    r = found.setdefault((level, spec + suffix), Realised(level, spec + suffix))
                    _replay(r, make_policy(spec, weights=weights, seed=seed), group, cost, seed)
    return list(found.values())


def _replay(r: Realised, policy: Policy, traces: Sequence[Trace], cost: CostTable, seed: int) -> None:
    tell_costs(policy, cost, [r.level])
    simulator = Simulator(policy, cost)
    for i in np.random.default_rng(seed).permutation(len(traces)):
        _add(r, traces[i], simulator.replay(traces[i]))


def _add(r: Realised, trace: Trace, replay: Replay) -> None:
    counts = Counter(replay.drafted.tolist())
    r.add(trace.prompt_id, replay.tokens, float(replay.seconds.sum()), {int(g): n for g, n in counts.items()})
