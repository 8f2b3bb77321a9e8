"""The simulator against the real decoder, step for step, and its clock against sums done by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from policies.base import Context, Decision, Outcome, Policy
from policies.fixed import Fixed
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.io.step_records import StepRecord
from speckv_online.models.pairs import LoadedPair, chat_prompt
from speckv_online.profiling.trace_collection import collect_trace
from speckv_online.simulate.cost_table import RTX3090_RELEASE, CostTable, LevelCost, fit_level, load_cost
from speckv_online.simulate.hindsight import best_fixed, clairvoyant, dynamic_programming_bound
from speckv_online.simulate.simulator import Simulator, replay_fixed, replay_plan
from speckv_online.traces.trace import Trace
from tests.support.replays import COST, LEVEL, POLICIES, compare, made
from tests.support.tiny_models import perturbed, tiny_llama

PROMPTS = ([5, 17, 101, 44, 44, 17, 101, 9], [33])
NAN = float("nan")


@dataclass
class Case:
    """A pair, traces of its free output, and traces that end early: at a token that the target really emits."""

    target: PreTrainedModel
    drafter: ModelDrafter
    free: list[Trace]
    ended: list[Trace]
    eos: int


@pytest.fixture(scope="module", params=[0.0, 0.15, 5.0], ids=["right", "sometimes", "wrong"])
def case(request: pytest.FixtureRequest) -> Case:
    target = tiny_llama()
    drafter = ModelDrafter(perturbed(target, request.param), 260)

    def collect(*eos: int) -> list[Trace]:
        return [collect_trace(target, drafter, p, 20, level="fp32", task="chat", eos_ids=eos)[0] for p in PROMPTS]

    free = collect()
    eos = next(int(t) for i, t in enumerate(free[0].tokens) if i >= 9 and t not in free[0].tokens[:i])
    return Case(target, drafter, free, collect(eos), eos)


@pytest.mark.parametrize("name", POLICIES)
def test_simulator_agrees_with_the_decoder(case: Case, name: str) -> None:
    compare(case.target, case.drafter, case.free, name, ())
    assert case.ended[0].finish == "eos"
    compare(case.target, case.drafter, case.ended, name, (case.eos,))


def test_seconds_are_the_cost_table_s() -> None:
    # Positions 0 (1 of 2 accepted: 2 tokens), 2 (both accepted: 3 tokens), 5 (budget left for no draft: 1 token).
    trace = made([1, 0, 2, 0, 0, 0])
    replay = Simulator(Fixed(gamma=2), COST).replay(trace)
    assert replay.produced.tolist() == [2, 3, 1]
    assert replay.drafted.tolist() == [2, 2, 0]
    first = 0.004 + 2 * 0.01 + 9 * 1e-3 + 0.07 + (10 - 50) * 1e-4 + 0.002  # the prompt is caught up with first
    second = 0.004 + 2 * 0.01 + 0.07 + (12 - 50) * 1e-4 + 0.002
    third = 0.05 + (15 - 50) * 1e-4 + 0.002
    np.testing.assert_allclose(replay.seconds, [first, second, third])
    assert replay.goodput == pytest.approx(6 / (first + second + third))


class Same(Fixed):
    """A fixed gamma that the simulator asks in every step, as it might learn."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        pass


@pytest.mark.parametrize("finish", ["eos", "length"])
def test_the_fast_path_for_fixed_gammas_equals_the_general_one(finish: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        length = int(rng.integers(1, 40))
        left = np.arange(length, 0, -1)
        lengths = np.minimum(np.where(rng.random(length) < 0.2, 16, rng.geometric(0.4, length) - 1), left)
        trace = made(np.minimum(lengths, 16).tolist(), finish)
        for gamma in (0, 1, 3, 16):
            fast, slow = (
                replay_fixed(trace, gamma, COST.levels["fp32"]),
                Simulator(Same(gamma=gamma), COST).replay(trace),
            )
            for name in fast.__dataclass_fields__:
                np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), err_msg=name)


def test_a_broken_policy_is_replayed_as_it_would_be_decoded() -> None:
    class Broken(Policy):
        def decide(self, context: Context) -> Decision:
            raise RuntimeError("no idea")

    simulator = Simulator(Broken(), COST)
    assert simulator.replay(made([1, 0, 2, 0, 0, 0])).tokens == 6
    assert sum(simulator.policy.faults.values()) > 0


def test_replay_needs_a_level_and_long_enough_drafts() -> None:
    with pytest.raises(UserError, match="no level 'int8'; it has fp32"):
        Simulator(Fixed(), COST).replay(made([0, 0], level="int8"))
    short = made([0, 0])
    short = Trace(**{n: getattr(short, n) for n in Trace.__dataclass_fields__} | {"drafts": short.drafts[:, :4]})
    with pytest.raises(UserError, match="too few"):
        Simulator(Fixed(), COST).replay(short)


class Asked(Fixed):
    """A fixed gamma that is asked at every step."""

    def decide(self, context: Context) -> Decision:
        return super().decide(context)


def brute_force(trace: Trace, cost: LevelCost) -> float:
    """Least seconds over all sequences of gammas of a short trace."""
    plans = (np.array(gammas) for gammas in itertools.product(range(4), repeat=len(trace)))
    return min(float(replay_plan(trace, plan, plan, cost).seconds.sum()) for plan in plans)


@pytest.mark.parametrize("catch_up", [0.0, 0.001, 0.003])
def test_the_least_time_of_all_sequences(catch_up: float) -> None:
    """What the draft has to read is planned for: at the dearest rate some texts are best decoded without it."""
    rng = np.random.default_rng(0)
    cost = LevelCost(0.02, (0.05, 0.07), 0.002, 1e-4, 12, catch_up_seconds=catch_up, first_draft_seconds=0.001)
    plain = 0
    for _ in range(8):
        trace = made(np.minimum(rng.integers(0, 4, 5), np.arange(5, 0, -1)).tolist())
        found = dynamic_programming_bound([trace], CostTable("test", {"fp32": cost}))["fp32"]
        assert found.seconds.sum() == pytest.approx(brute_force(trace, cost))
        plain += not found.drafted.any()
    assert plain < 8
    assert plain > 0 or catch_up < 0.001


def test_wrong_tokens_may_be_worth_drafting() -> None:
    """Where a wider verification is the cheaper one, or where drafting is a cheaper way to read than reading."""
    rng, wasteful = np.random.default_rng(1), 0
    for cost in (LevelCost(0.001, (0.05, 0.09, 0.08, 0.02)), LevelCost(0.002, (0.05, 0.051), catch_up_seconds=0.008)):
        for _ in range(6):
            trace = made(np.minimum(rng.integers(0, 3, 5), np.arange(5, 0, -1)).tolist())
            found = dynamic_programming_bound([trace], CostTable("test", {"fp32": cost}))["fp32"]
            assert found.seconds.sum() == pytest.approx(brute_force(trace, cost))
            assert found.tokens == len(trace)
            wasteful += bool((found.drafted > found.accepted).any())
    assert wasteful > 0


def test_hindsight_bounds() -> None:
    rng = np.random.default_rng(0)
    cost = LevelCost(0.02, (0.05, 0.07), 0.002, 1e-4, 12, first_draft_seconds=0.003)
    table = CostTable("test", {"fp32": cost})
    left = np.arange(40, 0, -1).clip(max=16)
    traces = [made(np.minimum(rng.geometric(0.4, 40) - 1, left).tolist()) for _ in range(8)]
    fixed, oracle = best_fixed(traces, table)["fp32"], clairvoyant(traces, table)["fp32"]
    bound = dynamic_programming_bound(traces, table)["fp32"]
    rates = {g: Simulator(Fixed(gamma=g), table).run(traces).goodput for g in range(17)}
    assert fixed.gamma == max(rates, key=rates.__getitem__)
    assert fixed.goodput == pytest.approx(max(rates.values()))
    assert fixed.goodput < oracle.goodput <= bound.goodput * (1 + 1e-12)
    # The oracle's rate is the fixed point: no step of it could be swapped for one that is worth more at that rate.
    starts = np.cumsum(oracle.position == 0) - 1
    for i, t, k in zip(starts, oracle.position, oracle.drafted, strict=True):
        trace = traces[i]
        options = range(min(int(trace.accepted[t]), trace.budget - t - 1) + 1)
        values = [j + 1 - oracle.goodput * cost.seconds(j, context=len(trace.prompt) + t) for j in options]
        assert values[k] == pytest.approx(max(values))


def step(k: int, context: int, draft: float, verify: float, rest: float = 0.003) -> StepRecord:
    return StepRecord(
        step=1, gamma=k, drafted=k, accepted=0, labelled=min(1, k), produced=1, mean_draft_entropy=0.0,
        mean_draft_confidence=0.0, max_draft_entropy=0.0, min_draft_confidence=0.0, context_length=context,
        propensity=1.0, policy_version=0, decision_id=0, decide_seconds=0.0, draft_seconds=draft, verify_seconds=verify,
        seconds=draft + verify + rest,
    )  # fmt: skip


def test_a_cost_table_is_recovered_from_noisy_steps() -> None:
    rng = np.random.default_rng(0)
    records = []
    for _ in range(3000):
        k, context = int(rng.choice([0, 1, 2, 4, 8])), int(rng.integers(20, 400))
        noise = 1 + 0.02 * rng.standard_normal(2) + (rng.random(2) < 0.1) * 5  # one step in ten stalls
        verify = 0.05 + 0.004 * k + 5e-5 * (context - 200)
        records.append(step(k, context, (0.009 * k + 0.006 * (k > 0)) * noise[0], verify * noise[1]))
    cost = fit_level(records)
    assert cost.draft_seconds == pytest.approx(0.009, rel=0.02)
    assert cost.first_draft_seconds == pytest.approx(0.006, rel=0.05)
    assert cost.overhead_seconds == pytest.approx(0.003, rel=0.02)
    assert cost.context_seconds == pytest.approx(5e-5, rel=0.1)
    want = [0.05 + 0.004 * k + 5e-5 * (cost.context_length - 200) for k in range(17)]
    np.testing.assert_allclose(cost.verify_seconds, want, rtol=0.05)


def test_a_step_takes_time_however_short_the_context() -> None:
    """A slope that was fitted to long contexts would have short ones take less than none."""
    cost = LevelCost(0.01, (0.05, 0.06), 0.002, 1e-3, 500)
    table = CostTable("test", {"fp32": cost})
    trace = made([1, 0, 2, 0, 0, 0])
    for gamma in (0, 2):
        replay = Simulator(Asked(gamma=gamma), table).replay(trace)
        least = 0.002 + 0.1 * np.array(cost.verify_seconds)[replay.drafted] + 0.01 * replay.drafted
        np.testing.assert_allclose(replay.seconds, least)
        np.testing.assert_allclose(replay_fixed(trace, gamma, cost).seconds, least)
    assert cost.seconds(1, context=10) == pytest.approx(0.002 + 0.01 + 0.006)
    assert clairvoyant([trace], table)["fp32"].goodput <= dynamic_programming_bound([trace], table)["fp32"].goodput * (
        1 + 1e-12
    )


@pytest.mark.parametrize(
    ("draft", "first", "each"),
    [
        ({}, 0.0, 0.0),
        ({4: 0.04}, 0.0, 0.01),  # one number of forwards alone tells nothing of the first
        ({1: 0.010, 3: 0.024}, 0.003, 0.007),
        ({1: 0.010, 2: 0.010, 4: 0.010}, 0.010, 0.0),
        (
            {1: 0.010, 2: 0.006},
            0.013 / 1.5,
            0.0,
        ),  # a draft never gets cheaper for being longer: the mean, weighted 1 and 1/2
        ({1: 0.010, 2: 0.030}, 0.0, 0.04 / 3),  # nor does its first token cost less than the others
    ],
)
def test_the_drafts_line_by_hand(draft: dict[int, float], first: float, each: float) -> None:
    cost = fit_level([step(0, 10, 0.0, 0.1)] + [step(k, 10, seconds, 0.1) for k, seconds in draft.items()])
    assert (cost.first_draft_seconds, cost.draft_seconds) == pytest.approx((first, each), abs=1e-12)


@pytest.mark.parametrize("k", range(1, 17))
def test_drafts_of_one_length_share_their_time_evenly(k: int) -> None:
    for count in (1, 34, 68, 599):
        cost = fit_level([step(k, 10, 0.01 * k, 0.1)] * count)
        assert (cost.first_draft_seconds, cost.draft_seconds) == pytest.approx((0.0, 0.01), abs=1e-12)


def test_cost_files(tmp_path: Path) -> None:
    path = COST.save(tmp_path / "cost.json")
    assert load_cost(path) == COST
    assert load_cost("rtx3090-release") is RTX3090_RELEASE
    assert RTX3090_RELEASE.level("int8").seconds(4) == pytest.approx(4 * 0.0105 + 0.090)
    assert LEVEL.seconds(0) == pytest.approx(0.052)
    assert LEVEL.seconds(1, context=70) == pytest.approx(0.076 + 20 * 1e-4)
    assert LEVEL.seconds(1, forwards=0) == pytest.approx(0.062)
    with pytest.raises(UserError, match="one of rtx3090-release"):
        load_cost("rtx4090")
    document = json.loads(path.read_text())
    del document["levels"]["fp32"]["first_draft_seconds"]  # as files were before that was told apart
    path.write_text(json.dumps(document))
    assert load_cost(path).level("fp32") == replace(LEVEL, first_draft_seconds=0.0)
    wrong = {
        "draft_seconds must be a number, at least 0 and below 1e+09, got -1": {"draft_seconds": -1},
        "verify_seconds must be a number, at least 1e-12 and below 1e+09, got 1000": {"verify_seconds": [10**400]},
        "verify_seconds must be a number, at least 1e-12 and below 1e+09, got 1e-320": {"verify_seconds": [1e-320]},
        "verify_seconds must be a list of numbers, got 1": {"verify_seconds": 1},
        "first_draft_seconds must be a number, at least 0 and below 1e+09, got nan": {
            "first_draft_seconds": float("nan")
        },
        "first_draft_seconds must be a number, at least 0 and below 1e+09, got '0.1'": {"first_draft_seconds": "0.1"},
        "overhead_seconds must be a number, at least 0 and below 1e+09, got True": {"overhead_seconds": True},
    }
    for said, change in wrong.items():
        level = {"draft_seconds": 1.0, "verify_seconds": [1.0]} | change
        path.write_text(json.dumps(document | {"levels": {"nf4": level}}))
        with pytest.raises(UserError, match="not a cost table: at nf4, a cost prior's ") as caught:
            load_cost(path)
        assert said in str(caught.value)
    for text in (json.dumps(document | {"version": 2}), json.dumps(document | {"levels": [1]}), "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="not a cost table"):
            load_cost(path)
    with pytest.raises(UserError, match="no timed steps"):
        fit_level([step(1, 10, 0.1, 0.0)])


def test_first_steps_tell_what_reading_a_prompt_takes() -> None:
    """Steps that drafted nothing read nothing; one text in ten met a stall."""
    later = [step(k, 50, 0.005 + 0.01 * k, 0.1) for _ in range(20) for k in (1, 2)]
    first = [
        replace(
            step(k, context, 0.01 * k + (0.005 + 2e-4 * (context - 1)) * (k > 0) + 3.0 * (i % 10 == 9), 5.0), step=0
        )
        for i, (k, context) in enumerate((k, context) for context in range(20, 60) for k in (0, 1, 2))
    ]
    cost = fit_level([*first, *later])
    assert cost.catch_up_seconds == pytest.approx(2e-4, rel=1e-6)
    assert cost.verify_seconds[2] == 0.1  # of later steps alone
    assert fit_level(later).catch_up_seconds == 0.0


#: Seeded policies that learn from acceptances, and stopping rules: what they do does not depend on a clock.
LEARNED = (
    "adaedl",
    "hf-confidence",
    "online:objective=tokens_per_step,safety=off,seed=3",
    "lints:objective=tokens_per_step,safety=off,seed=3",
)


@pytest.fixture(scope="module")
def real_traces(real_pair: LoadedPair) -> list[Trace]:
    prompts = [chat_prompt(real_pair.tokenizer, text) for text in ("What is a prime number?", "Write a haiku.")]
    return [collect_trace(real_pair.target, real_pair.drafter, p, 16, level="fp32")[0] for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed:4", "random", "stopping", *LEARNED])
def test_simulator_agrees_with_the_decoder_on_the_real_pair(
    real_pair: LoadedPair, real_traces: list[Trace], name: str
) -> None:
    compare(real_pair.target, real_pair.drafter, real_traces, name, None)
