"""Other drafts: the directions in which a head may move at once, from training to the policy's prior."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.train import main
from policies.base import Context, Outcome, PolicyError
from policies.estimators.bayesian_linear import widen
from policies.learned.mlp16 import SHAPES, Weights, check_weights, load_weights
from policies.learned.online import FIRST, Online
from speckv_online.training.head_shift import head_shift, other_drafts
from speckv_online.training.mlp16 import Data
from tests.support.made_traces import made_trace


def made_weights(**more: np.ndarray) -> Weights:
    rng = np.random.default_rng(3)
    return check_weights({k: 0.3 * rng.normal(size=shape) for k, shape in SHAPES.items()} | more, "here")


def test_widen_adds_to_the_covariance() -> None:
    rng = np.random.default_rng(0)
    root, directions = rng.normal(size=(6, 6)), rng.normal(size=(2, 6))
    covariance = root @ root.T + np.eye(6)
    wider = widen(np.linalg.inv(covariance), directions)
    assert np.linalg.inv(wider) == pytest.approx(covariance + directions.T @ directions, abs=1e-9)


def test_shift_is_what_another_head_predicts_better_by() -> None:
    weights, rng = made_weights(), np.random.default_rng(1)
    x = rng.normal(size=(20_000, 6))
    phi, truth = np.c_[weights.hidden(x), np.ones(len(x))], rng.normal(size=17)
    names = np.array(["a"] * len(x))
    found = head_shift(weights, Data(x, phi @ (weights.head + truth), names, names, names))
    assert found.before == pytest.approx(np.mean((phi @ truth) ** 2))
    assert found.after == pytest.approx(np.mean((phi @ (truth - found.shift)) ** 2))
    assert found.after < 0.02 * found.before


def test_only_other_drafts_are_shifts() -> None:
    traces = [made_trace(i) for i in range(4)]
    for trace, name in zip(traces, ("own", "own", "other", ""), strict=True):
        trace.meta["draft_fingerprint"] = name
    assert other_drafts(traces[:1], traces[1:]) == {("other", "fp16"): [traces[2]]}


def test_command_writes_shifts_of_further_drafts(tmp_path: Path) -> None:
    for name, prompts in (("own", range(4)), ("better", range(6, 9))):
        for i in prompts:
            trace = made_trace(i)
            trace.meta["draft_fingerprint"] = name
            trace.save(tmp_path / name / trace.level / f"{trace.prompt_id}.npz")
    arguments = ["--traces", str(tmp_path / "own"), "--more", str(tmp_path / "better"), "--out", str(tmp_path / "w")]
    assert main([*arguments, "--gammas", "1,4", "--epochs", "1", "--seeds", "1"]) == 0
    weights = load_weights(tmp_path / "w" / "mlp16.npz")
    assert weights.head_shift is not None
    assert weights.head_shift.shape == (1, 17)
    (about,) = json.loads((tmp_path / "w" / "mlp16.json").read_text())["other_drafts"]
    assert about["draft_fingerprint"] == "better"
    assert (about["level"], about["rows"] > 50) == ("fp16", True)
    assert about["mse_of_its_own_head"] < about["mse_of_mlp16"]


@pytest.mark.parametrize("shift", [np.zeros(17), np.zeros((1, 16)), np.full((1, 17), np.nan)])
def test_broken_shifts_are_refused(shift: np.ndarray) -> None:
    with pytest.raises(PolicyError, match="head_shift"):
        made_weights(head_shift=shift)


def mean_rates(policy: Online, context: Context) -> np.ndarray:
    phi = policy.net.phi([context.level], policy.features(context)[None])[0]
    return np.asarray(phi @ policy.head.mean)


def test_a_shift_lets_a_few_steps_move_the_whole_head() -> None:
    # The hidden layer is silent but for the constant, and the other draft is right 0.5 more of the time.
    silent = {"W1": np.zeros((6, 16)), "b1": np.full(16, -1.0), "W2": np.zeros((16, 1)), "b2": np.array([0.3])}
    plain = Weights(**silent, phi_cov=np.eye(17), noise_var=0.08)
    wide = replace(plain, head_shift=np.append(np.zeros(16), 0.5)[None])
    found = {}
    for name, weights in (("plain", plain), ("wide", wide)):
        policy, context = Online(weights=weights, explore="greedy", strength=2000.0), Context(level="nf4")
        assert mean_rates(policy, context) == pytest.approx(0.3)
        for _ in range(FIRST):
            decision = policy.decide(context)
            policy.learn(decision, Outcome(16, 16, 16, 17, 0.2, 0.1, 0.1, "nf4", 100))
        found[name] = mean_rates(policy, context).mean()
    assert found["plain"] < 0.35
    assert found["wide"] > 0.7


def test_first_updates_come_soon_and_later_ones_every_refresh_steps() -> None:
    policy, context, updates = Online(weights=made_weights(), refresh=16), Context(level="nf4"), list[int]()
    for step in range(1, 61):
        before = policy.version
        policy.learn(policy.decide(context), Outcome(4, 1, 2, 2, 0.2, 0.1, 0.1, "nf4", 100))
        if policy.version > before:
            updates.append(step)
    assert updates == [4, 12, 28, 44, 60]


def test_further_traces_are_of_the_same_split_and_levels(tmp_path: Path) -> None:
    for name, level, split, prompts in (
        ("own", "fp16", "train", range(4)), ("more", "fp16", "", (4,)), ("more", "fp16", "test", (5,)),
        ("more", "nf4", "train", (6,)),
    ):  # fmt: skip
        for i in prompts:
            trace = replace(made_trace(i, level), split=split)
            trace.save(tmp_path / name / level / f"{trace.prompt_id}.npz")
    arguments = ["--traces", str(tmp_path / "own"), "--more", str(tmp_path / "more"), "--out", str(tmp_path / "w")]
    assert main([*arguments, "--levels", "fp16", "--gammas", "1,4", "--epochs", "1", "--seeds", "1"]) == 0
    card = json.loads((tmp_path / "w" / "goodput.json").read_text())
    assert (card["levels"], card["data"]["traces"]) == (["fp16"], 5)
