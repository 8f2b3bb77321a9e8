"""Serving in the simulator: seconds by hand, outputs whole under any policy, replicas that share, tables that fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from speckv_online.errors import UserError
from speckv_online.serving.engine import Engine
from speckv_online.simulate.engine_costs import EngineCosts, fit
from speckv_online.simulate.serving import Fleet, Load
from speckv_online.traces.trace import Trace
from tests.support.replays import made

COSTS = EngineCosts("made up", tuple(0.010 + 0.001 * n for n in range(1, 200)), 0.001, 0.002, 0.0003, 0.0001, 0.0002)
MODEL = Engine("made up", "fp32", "draft_model", looks_up=False, most_drafts=8, most_rows=8)
LOOKUP = Engine("made up", "fp32", "ngram", looks_up=True, most_drafts=8, most_rows=8)


def traces(count: int = 12, accepted: float = 0.7, seed: int = 0) -> list[Trace]:
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(5, 40))
        hits = np.minimum(rng.geometric(1 - accepted, length) - 1, np.arange(length, 0, -1)).clip(0, 16)
        found.append(made(hits.tolist(), prompt=int(rng.integers(1, 30))))
    return found


def test_seconds_by_hand() -> None:
    trace = made([0] * 5, prompt=10)
    served = Fleet("autoregressive", MODEL, COSTS).serve([trace], Load(1, concurrency=1))
    prompt, token = COSTS.verify[9] + COSTS.rest, COSTS.verify[0] + COSTS.rest
    assert served.seconds == pytest.approx(prompt + 4 * token)
    assert served.first == pytest.approx([prompt])
    assert served.each == pytest.approx([token])

    # The draft has not read the prompt: ten tokens and the first answer's. Then two drafts a step, both right.
    trace = made([0, 2, 0, 0, 0], prompt=10)
    served = Fleet("fixed:2", MODEL, COSTS).serve([trace], Load(1, concurrency=1))
    assert served.tokens == 5
    assert (served.drafted, served.accepted) == (2, 2)
    assert served.steps == 3  # the prompt; two drafts and one more; the last one
    drafting = COSTS.first + 2 * COSTS.each_round + 2 * COSTS.each
    steps = [
        COSTS.verify[9] + COSTS.rest + drafting + 9 * COSTS.read,
        COSTS.verify[2] + COSTS.rest + drafting,
        COSTS.verify[0] + COSTS.rest,
    ]
    assert served.seconds == pytest.approx(sum(steps))


@pytest.mark.parametrize("engine", [MODEL, LOOKUP], ids=["model", "lookup"])
@pytest.mark.parametrize("load", [Load(60, concurrency=1), Load(60, concurrency=6), Load(60, rate=20.0)], ids=str)
@pytest.mark.parametrize("policy", ["online", "fixed:3", "tests.support.serving:Wild", "tests.support.serving:Raises"])
def test_every_request_ends_with_its_tokens(policy: str, load: Load, engine: Engine) -> None:
    given = traces()
    served = Fleet(policy, engine, COSTS).serve(given, load, seed=1)
    rng = np.random.default_rng(1)
    order = [k for _ in range(5) for k in rng.permutation(12).tolist()]
    assert served.tokens == sum(len(given[k]) for k in order)
    assert len(served.first) == len(served.each) == 60
    assert min(served.first) > 0
    assert 0 < served.accepted <= served.drafted
    assert sum(served.chosen.values()) == served.steps


def test_more_arrivals_wait_longer() -> None:
    waits = [np.median(Fleet("autoregressive", MODEL, COSTS).serve(traces(), Load(80, rate=r)).first) for r in (1, 40)]
    assert waits[1] > 1.5 * waits[0]


def test_replicas_share_what_they_learn() -> None:
    fleet = Fleet("online", LOOKUP, COSTS, replicas=4, sync_every=16)
    fleet.serve(traces(), Load(120, concurrency=3))
    learner = fleet._learner
    assert learner is not None
    known = learner.state_dict()
    steps = [replica.steps for replica in fleet._replicas]
    assert min(steps) > 16
    alone = Fleet("online", LOOKUP, COSTS)
    alone.serve(traces(), Load(30, concurrency=3))
    own = alone._replicas[0].controller.policy.state_dict()
    # Sums of the draft's tested tokens: all replicas' are in the learner's.
    assert known["history.head.misc"][0] > 2 * own["history.head.misc"][0] / 4
    fleet._exchange(fleet._replicas[0])
    mine = fleet._replicas[0].controller.policy.state_dict()
    assert all(np.allclose(value, mine[name]) for name, value in learner.state_dict().items())


def test_what_drafting_takes_is_told_apart() -> None:
    """A step is measured as a whole; the draft is far dearer than the policy expects of one."""
    heavy = EngineCosts("heavy", tuple(0.030 + 0.0003 * n for n in range(1, 200)), each_round=0.009)
    fleet = Fleet("online", MODEL, heavy)
    for seed in range(4):
        served = fleet.serve(traces(accepted=0.8), Load(60, concurrency=2), seed)
    costs = fleet._replicas[0].controller.policy.batch_costs.level("fp32")
    assert costs.drafting(1, 2, 0) == pytest.approx(0.009, rel=0.4)
    plain = Fleet("autoregressive", MODEL, heavy).serve(traces(accepted=0.8), Load(60, concurrency=2), 3)
    assert served.throughput > 1.25 * plain.throughput


def test_a_table_fits_what_was_measured(tmp_path: Path) -> None:
    rng, steps = np.random.default_rng(0), []
    for _ in range(600):
        rows = int(rng.integers(1, 17))
        rounds = int(rng.choice([0, 1, 2, 4]))
        tokens, forwards = rows * (1 + int(rng.integers(0, 5))), rows * rounds
        read, context = int(rng.integers(0, 20)) * (rounds > 0), int(rng.integers(10, 300)) * rows
        seconds = COSTS.seconds(tokens, rows, context, rounds, forwards, read) * np.exp(0.03 * rng.normal())
        steps.append((tokens, rows, context, rounds, forwards, read, seconds * (1 + 5 * (rng.random() < 0.01))))
    found = fit("again", steps)
    for tokens, rows, rounds in ((1, 1, 0), (16, 16, 0), (16, 16, 2), (40, 8, 4)):
        asked = tokens, rows, 100 * rows, rounds, rows * rounds, 0
        assert found.seconds(*asked) == pytest.approx(COSTS.seconds(*asked), rel=0.05)
    found.save(tmp_path / "engine.json")
    assert EngineCosts.load(tmp_path / "engine.json") == found
    for text in ("", "[]", "{}", '{"format": "speckv-engine-costs", "version": 1, "name": "a", "verify": [2, 1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError):
            EngineCosts.load(tmp_path / "bad.json")


def test_loads_are_checked() -> None:
    for wrong in ({"requests": 0, "rate": 1.0}, {"requests": 1}, {"requests": 1, "rate": 1.0, "concurrency": 1}):
        with pytest.raises(UserError):
            Load(**wrong)  # type: ignore[arg-type]
