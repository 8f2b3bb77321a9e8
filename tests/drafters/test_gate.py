"""The hybrid drafter's gate: its file, its fit to traces; exact traces and replays of each drafter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.gate import main
from policies.base import CONFIDENCE, ENTROPY, MARGIN, N_SIGNALS, Context, Decision, Draft, Outcome, Policy
from speckv_online.decoding.batch import decode_batch
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.fingerprint import drafter_fingerprint
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.drafters.spec import parse_drafter
from speckv_online.errors import UserError
from speckv_online.lookup.gate import FEATURES, Gate
from speckv_online.profiling.trace_collection import collect_trace
from speckv_online.simulate.simulator import Simulator, replay_fixed
from speckv_online.traces.trace import Trace, agreement
from speckv_online.training.acceptance import tokens_from_traces, train_acceptance
from speckv_online.training.gate import (
    choose,
    cross_fit,
    fit_gate,
    lookup_confidences,
    positions,
    tune_skip,
)
from tests.support.drafting import one_by_one
from tests.support.lookups import REPEATING, gate_that
from tests.support.replays import COST, POLICIES, compare
from tests.support.tiny_models import TinyPair


def make(kind: str, pair: TinyPair) -> Drafter:
    if kind == "ngram":
        return NgramDrafter()
    skip, gate = (1.0, gate_that(True)) if kind == "takes the lookup" else (0.5, None)
    return HybridDrafter(pair.draft, 260, gate=gate, skip=skip)


@pytest.fixture(scope="module", params=["ngram", "hybrid", "takes the lookup"])
def traced(request: pytest.FixtureRequest, tiny_pair: TinyPair) -> tuple[Drafter, list[Trace]]:
    drafter = make(request.param, tiny_pair)
    prompts = (REPEATING, [7, 7, 8])
    traces = [
        collect_trace(tiny_pair.target, drafter, p, 20, level="fp32", task="chat", eos_ids=())[0] for p in prompts
    ]
    # The same output once more, now ending at a token that it really holds.
    eos = int(traces[0].tokens[13])
    traces.append(collect_trace(tiny_pair.target, drafter, REPEATING, 20, level="fp32", task="chat", eos_ids=[eos])[0])
    return drafter, traces


def test_tables_are_what_the_drafter_drafts(traced: tuple[Drafter, list[Trace]]) -> None:
    drafter, traces = traced
    for trace, gamma in zip(traces, (16, 5), strict=False):
        trace.check()
        drafts, signals = one_by_one(drafter, trace.prompt.tolist(), trace.tokens.tolist(), gamma)
        np.testing.assert_array_equal(trace.drafts[:, :gamma], drafts)
        offered = np.arange(gamma) < trace.available[:, None]
        np.testing.assert_allclose(trace.signals[:, :gamma][offered], signals[offered], atol=2e-3)
        assert offered.all() == (drafter.names[0] == "hybrid")


def test_what_is_free_is_what_the_drafter_says_beforehand(traced: tuple[Drafter, list[Trace]]) -> None:
    drafter, traces = traced
    for trace in traces[:2]:
        told = np.zeros(trace.drafts.shape)
        drafter.begin(trace.prompt.tolist(), 200)
        for t, token in enumerate(trace.tokens.tolist()):
            for j in range(int(trace.available[t])):
                told[t, j] = drafter.lookup_confidence()
                drafter.draft(np.zeros(N_SIGNALS))
            drafter.end(0)
            drafter.extend([token])
        assert trace.lookups is not None
        np.testing.assert_allclose(trace.lookups, told, atol=1e-6)
        asked = np.pad((told == 0.0).cumsum(axis=1), ((0, 0), (1, 0)))
        offered = np.arange(trace.gamma + 1) <= trace.available[:, None]
        np.testing.assert_array_equal(trace.forwards[offered], asked[offered])
        assert trace.lookups.any() == (drafter.names[0] == "ngram" or drafter.skip < 1.0)


class FollowsLookups(Policy):
    """Drafts as long as it is free, and one token more."""

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), 9 if context.lookup_confidence else context.step % 3, ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return draft.lookups[draft.drafted - 1] > 0.0


def test_a_policy_is_told_in_a_replay_what_the_decoder_tells(
    traced: tuple[Drafter, list[Trace]], tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, traces = traced
    monkeypatch.setitem(POLICIES, "follows", lambda: FollowsLookups(seed=0))
    compare(tiny_pair.target, drafter, traces[:2], "follows", ())


class Notes(Policy):
    """Keeps what it is told of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int, bool]] = []

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), context.step % 7, ask_per_token=context.step % 2 > 0)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        drafted = draft.drafted
        return drafted < 4

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.told.append((outcome.drafted, outcome.forwards, outcome.exhausted))


def test_the_end_of_what_a_lookup_knows_is_told(traced: tuple[Drafter, list[Trace]], tiny_pair: TinyPair) -> None:
    drafter, traces = traced
    prompts = [trace.prompt.tolist() for trace in traces[:2]]
    replayed, decoded, batched = Notes(), Notes(), Notes()
    Simulator(replayed, COST).run(traces[:2])
    for prompt in prompts:
        SpeculativeDecoder(drafter, policy=decoded, target=tiny_pair.target).generate(prompt, 20, eos_ids=())
    decode_batch(SpeculativeDecoder(drafter, policy=batched, target=tiny_pair.target), prompts, 20, eos_ids=())
    assert decoded.told == replayed.told
    assert sorted(batched.told) == sorted(replayed.told)
    lookup = drafter.names[0] == "ngram"
    assert {said for _, _, said in decoded.told} == ({True, False} if lookup else {False})
    assert (0, 0, lookup) in decoded.told


def test_acceptance_weights_are_fitted_to_the_model_s_tokens_only(traced: tuple[Drafter, list[Trace]]) -> None:
    """Of a lookup's, how sure the drafter is is all that a policy goes by."""
    drafter, traces = traced
    if drafter.names[0] == "ngram":
        with pytest.raises(UserError, match="no tested token of a draft model"):
            tokens_from_traces(traces)
        return
    tokens = tokens_from_traces(traces)
    assert tokens.before.shape == (len(tokens), 16)
    assert len(tokens.y) == len(tokens.buckets) == len(tokens.group)
    free = [replace(trace, lookups=np.zeros_like(trace.lookups)) for trace in traces]
    fewer = any(trace.lookups is not None and trace.lookups.any() for trace in traces)
    assert (len(tokens) < len(tokens_from_traces(free))) == fewer
    assert np.isfinite(train_acceptance(tokens)["before"]).all()


@pytest.mark.parametrize("name", ["fixed:4", "random", "stopping"])
def test_a_replay_is_what_the_decoder_does(traced: tuple[Drafter, list[Trace]], tiny_pair: TinyPair, name: str) -> None:
    drafter, traces = traced
    compare(tiny_pair.target, drafter, traces[:2], name, ())
    assert traces[2].finish == "eos"
    compare(tiny_pair.target, drafter, traces[2:], name, (int(traces[2].tokens[-1]),))


def test_a_table_replay_is_that_of_the_policy(traced: tuple[Drafter, list[Trace]]) -> None:
    """Where there is nothing to propose, nothing is drafted, and a lookup never has to catch up."""
    _, traces = traced
    for trace in traces:
        for gamma in (1, 16):
            slow = Simulator(POLICIES[f"fixed:{gamma}"](), COST)
            rows = np.array(list(slow._steps(trace, COST.level("fp32"))))
            compiled = replay_fixed(trace, gamma, COST.level("fp32"))
            np.testing.assert_array_equal(rows[:, 0], compiled.position)
            np.testing.assert_array_equal(rows[:, 2], compiled.drafted)
            np.testing.assert_allclose(rows[:, 7], compiled.seconds)


# Fitting


@pytest.fixture(scope="module")
def model_traces() -> list[Trace]:
    """Made-up outputs that repeat themselves now and then, and a draft model that is right as often as it thinks."""
    found, length = [], 60
    for seed in range(10):
        rng = np.random.default_rng(seed)
        parts = [rng.integers(1, 12, 10), np.tile(rng.integers(1, 12, 6), 4), rng.integers(1, 12, 26)]
        tokens = np.concatenate(parts).astype(np.int32)
        drafts, signals = np.zeros((length, 16), np.int32), np.zeros((length, 16, N_SIGNALS), np.float32)
        sure = rng.uniform(0.1, 0.98, length)
        drafts[:, 0] = np.where(rng.random(length) < sure, tokens, tokens % 11 + 1)
        signals[:, 0, ENTROPY], signals[:, 0, CONFIDENCE], signals[:, 0, MARGIN] = 4 * (1 - sure), sure, 5 * sure
        prompt = rng.integers(1, 12, 4).astype(np.int32)
        found.append(
            Trace(
                "fp32", "chat", f"p{seed}", prompt, tokens, drafts, agreement(drafts, tokens), signals, length, "length"
            )
        )
    return found


def test_the_fit_prefers_what_is_right(model_traces: list[Trace]) -> None:
    data = positions(model_traces)
    assert len(data.found) == 600
    assert data.decisive.sum() > 30
    gate = fit_gate(data)
    right, asked = choose(gate, data)
    assert asked.all()
    assert right.mean() > max(data.model.mean(), data.lookup.mean())
    assert right.mean() <= (data.model | data.lookup).mean()
    held_out, _ = cross_fit(data, folds=4)
    assert held_out.mean() > max(data.model.mean(), data.lookup.mean())
    # The two roads to a decision agree: arrays here, one position at a time in the drafter.
    for row in np.flatnonzero(data.differ)[:20]:
        assert gate.prefers_lookup(data.features[row].tolist()) == (data.features[row] @ gate.weights > 0)
    # Asking less often may cost a little, as little as the tuning allows on the same folds.
    skip = tune_skip(data)
    assert cross_fit(data, skip)[0].mean() >= cross_fit(data)[0].mean() - 0.002
    assert cross_fit(data, skip)[1].mean() < 1 or skip == 1
    p = lookup_confidences(gate, data)[data.found]
    assert p[data.lookup[data.found]].mean() > p[~data.lookup[data.found]].mean() + 0.3
    assert abs(p.mean() - data.lookup[data.found].mean()) < 0.05


def test_the_gate_file_round_trips_and_damage_is_named(model_traces: list[Trace], tmp_path: Path) -> None:
    gate = fit_gate(positions(model_traces))
    gate.skip = 0.7
    path = gate.save(tmp_path / "gate.npz")
    again = Gate.load(path)
    assert (again.weights, again.skip) == (gate.weights, 0.7)
    assert again.digest == gate.digest != Gate.load().digest
    assert json.loads(path.with_suffix(".json").read_text())["digest"] == gate.digest
    with np.load(path) as file:
        arrays = dict(file)
    for broken in (
        arrays | {"weights": np.ones(3)},
        arrays | {"sure": np.array([object()] * 5)},
        arrays | {"head": np.array("{}")},
        arrays | {"head": np.array(str(arrays["head"]).replace('"card": {', '"card": [1], "of": {'))},
    ):
        np.savez(path, **broken)
        with pytest.raises(UserError, match=r"gate\.npz is no usable gate"):
            Gate.load(path)
    with pytest.raises(UserError, match="no gate"):
        Gate.load(tmp_path / "none.npz")


# The command and the specs


def test_the_command_fits_reports_and_saves(
    model_traces: list[Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, part in (("train", model_traces[:6]), ("test", model_traces[6:])):
        for trace in part:
            trace.save(tmp_path / folder / f"{trace.prompt_id}.npz")
    out = tmp_path / "gate.npz"
    there = ["--traces", str(tmp_path / "train"), "--out", str(out)]
    assert main([*there, "--test", str(tmp_path / "test")]) == 0
    said = capsys.readouterr().out
    assert "4 held-out prompts" in said
    card = json.loads(out.with_suffix(".json").read_text())
    found = card["right per position"]["all"]
    assert found["model"] < found["hybrid"] <= found["better of the two (hindsight)"]
    assert str(tmp_path) not in out.with_suffix(".json").read_text()
    assert len(Gate.load(out).weights) == len(FEATURES)
    assert main([*there, "--test", str(tmp_path / "train")]) == 2
    assert "judge on others" in capsys.readouterr().err
    assert main([]) == 2
    assert "--traces is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("tree", "unknown drafter"), ("ngram:skip=1", "no option"), ("hybrid:skip=2", "probability"),
     ("hybrid:online=true", "no option"), ("hybrid:gates=x", "no option")],
)  # fmt: skip
def test_mistakes_in_a_drafter_are_named(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_drafter(text)


def test_specs_build_what_they_say(tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = gate_that(True).save(tmp_path / "gate.npz")
    kinds = {"model": ModelDrafter, "ngram": NgramDrafter, "hybrid": HybridDrafter}
    for name, kind in kinds.items():
        assert type(parse_drafter(name).build(tiny_pair.draft, 260)) is kind
    hybrid = parse_drafter(f"hybrid:skip=0.9,gate={path}").build(tiny_pair.draft, 260)
    assert isinstance(hybrid, HybridDrafter)
    assert (hybrid.skip, hybrid.gate.weights[0]) == (0.9, 1.0)
    prints = {drafter_fingerprint(parse_drafter(t).build(tiny_pair.draft, 260)) for t in (*kinds, "hybrid:skip=0.9")}
    assert len(prints) == 4
    with pytest.raises(UserError, match="go together"):
        parse_drafter("hybrid").check_models("a", None)
    with pytest.raises(UserError, match="leave --draft out"):
        parse_drafter("ngram").check_models("a", "b")
