"""Training MLP16: what it recovers from made-up data, what it holds out, and what the command writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.train import main
from policies.acceptance.context_table import SHAPE
from policies.acceptance.features import token_features
from policies.acceptance.mlp16 import DEFAULT_WEIGHTS, Mlp16, load_weights
from policies.acceptance.model import prior_means
from policies.base import Context
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import RTX3090_RELEASE
from speckv_online.simulate.simulator import Simulator
from speckv_online.traces.trace import Trace, load_traces
from speckv_online.training.acceptance import (
    auc,
    evaluate_acceptance,
    fit_logistic,
    tokens_from_traces,
    train_acceptance,
)
from speckv_online.training.mlp16 import Data, data_from_traces, evaluate, split_by_prompt, train_mlp16
from tests.support.made_traces import made_trace
from tests.support.release import RELEASE

RECORDS = RELEASE / "phase2_step_results.csv"


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return [made_trace(p, level) for p in range(20) for level in ("fp16", "nf4")]


def test_labels_of_every_gamma_are_those_of_the_trace() -> None:
    trace = made_trace(7, length=12)
    data = data_from_traces([trace], gammas=(1, 4, 16))
    assert set(np.unique(data.x[:, 5])) == {1, 4}  # 16 never fits into a budget of 12
    # The first step start of the first schedule is position 0, with neutral signals.
    assert data.x[:2].tolist() == [[2.0, 0.5, 4.0, 0.25, 0.0, 1.0], [2.0, 0.5, 4.0, 0.25, 0.0, 4.0]]
    assert data.y[:2].tolist() == [min(int(trace.accepted[0]), g) / g for g in (1, 4)]
    assert (data.x[:, 4] == 0).all()
    assert (data_from_traces([made_trace(7, "nf4")]).x[:, 4] == 2).all()


def test_no_prompt_is_on_both_sides(traces: list[Trace]) -> None:
    data = data_from_traces(traces, gammas=(2,))
    train, held = split_by_prompt(data.prompt, 0.25, seed=3)
    assert not set(data.prompt[train]) & set(data.prompt[held])
    assert len(set(data.prompt[held])) == 5
    assert (train ^ held).all()
    with pytest.raises(UserError, match="two prompts"):
        split_by_prompt(np.array(["p1", "p1"]), 0.25)


def test_training_finds_what_the_signals_tell(traces: list[Trace]) -> None:
    data = data_from_traces(traces, gammas=(1, 4, 8))
    fit = train_mlp16(data, seeds=(0, 1), epochs=40)
    assert fit.metrics["mse"] < 0.75 * fit.metrics["mse_of_mean_per_level_and_gamma"]
    assert fit.metrics["correlation"] > 0.5
    w = fit.weights
    assert w.phi_cov is not None
    assert (w.W1.shape, w.b1.shape, w.W2.shape, w.b2.shape) == ((6, 16), (16,), (16, 1), (1,))
    # In raw units, without any scaling: longer drafts have a lower rate, confident ones a higher.
    rate = [
        w.predict(np.array([[4 * (1 - c), c, 4 * (1 - c), c, 0.0, g]]))[0] for c, g in ((0.8, 1), (0.8, 8), (0.2, 1))
    ]
    assert rate[0] > rate[1] + 0.1
    assert rate[0] > rate[2] + 0.3
    phi = np.c_[w.hidden(data.x), np.ones(len(data))]
    np.testing.assert_allclose(w.phi_cov, sum(np.outer(p, p) for p in phi) / len(phi), rtol=1e-9)
    assert fit.noise_var == pytest.approx(np.mean((phi @ w.head - data.y) ** 2))
    again = train_mlp16(data, seeds=(0, 1), epochs=40)
    np.testing.assert_array_equal(w.W1, again.weights.W1)


def test_an_input_that_never_varied_has_no_say(traces: list[Trace]) -> None:
    data = data_from_traces([t for t in traces if t.level == "fp16"], gammas=(1, 4))
    weights = train_mlp16(data, seeds=[0], epochs=2).weights
    assert (weights.W1[4] == 0).all()


def test_metrics_are_those_of_the_rows() -> None:
    x = np.array([[0.0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 1]])
    data = Data(
        x,
        np.array([1.0, 0.5, 0.0]),
        np.array(["a", "b", "b"]),
        np.array(["fp16", "fp16", "int8"]),
        np.array(["chat"] * 3),
    )
    weights = train_mlp16(data, epochs=1, seeds=[0]).weights
    p = weights.predict(x)
    found = evaluate(weights, data, data)
    assert found["mse"] == pytest.approx(np.mean((p - data.y) ** 2))
    assert found["by_level"]["int8"]["mse"] == pytest.approx(p[2] ** 2)
    assert found["by_gamma"]["2"]["rows"] == 1
    assert found["mse_of_mean_per_level_and_gamma"] == 0


def test_command_writes_weights_that_the_policies_read(
    traces: list[Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trace in traces:
        trace.save(tmp_path / "traces" / trace.level / f"{trace.prompt_id}.npz")
    out = tmp_path / "deep" / "mlp16.npz"
    arguments = ["--traces", str(tmp_path / "traces"), "--out", str(out.parent), "--gammas", "1,4", "--epochs", "3"]
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "correlation" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
        rows = int(file["n_records"])
    assert shapes == {
        "W1": (6, 16), "b1": (16,), "W2": (16, 1), "b2": (1,), "phi_cov": (17, 17), "n_records": (), "noise_var": (),
    }  # fmt: skip
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["data"]["rows"], card["data"]["prompts"], card["data"]["traces"]) == (rows, 20, 40)
    assert (card["features"], card["levels"], card["gammas"]) == ("causal", ["fp16", "nf4"], [1, 4])
    assert card["data"]["draft"] == ["made"]
    assert card["data"]["sha256"] == data_from_traces(load_traces(tmp_path / "traces"), gammas=(1, 4)).sha256()
    assert str(tmp_path) not in out.with_suffix(".json").read_text()
    # The trained weights play: predictions and a whole replay.
    assert Mlp16(load_weights(out)).predict(Context()).min() >= 0
    for name in ("mlp16", "online", "online"):
        policy = make_policy(name, weights=str(out), acceptance=str(out.with_name("online.npz")))
        replay = Simulator(policy, RTX3090_RELEASE).run(traces[:4])
        assert replay.tokens == sum(len(t) for t in traces[:4])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--traces DIRECTORY is missing"),
        (["--traces", "nowhere"], "nowhere"),
        (["--traces", "nowhere", "--features", "psychic"], "psychic"),
        (["--traces", "nowhere", "--gammas", "0,2"], "from 1 to 16"),
        (["--traces", "nowhere", "--seed", "-1"], "--seed not negative"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_acceptance_rows_are_the_tested_tokens() -> None:
    trace = made_trace(6, length=12)
    tokens = tokens_from_traces([trace])
    # Every schedule starts at position 0, where what is tested is known by hand.
    labelled = min(int(trace.accepted[0]) + 1, 11)
    assert tokens.y[:labelled].tolist() == [1.0] * (labelled - 1) + [0.0 if trace.accepted[0] < 11 else 1.0]
    assert (tokens.before.shape, tokens.after.shape) == ((len(tokens), 16), (len(tokens), 16))
    own = token_features(trace.signals[0, 0].tolist())
    np.testing.assert_allclose(tokens.after[0, 1:4], own[:3])
    np.testing.assert_allclose(tokens.before[1, 1:6], own)  # the token before the second one


def test_acceptance_weights_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    x = np.c_[np.ones(20_000), rng.standard_normal((20_000, 2))]
    truth = np.array([-0.5, 2.0, 0.0])
    y = (rng.random(20_000) < 1 / (1 + np.exp(-x @ truth))).astype(float)
    weights, precision = fit_logistic(x, y, np.zeros(3))
    np.testing.assert_allclose(weights, truth, atol=0.1)
    p = 1 / (1 + np.exp(-x @ weights))
    np.testing.assert_allclose(x.T @ (y - p), weights, atol=1e-3)  # the gradient vanishes, ridge included
    np.testing.assert_allclose(precision, (x * (p * (1 - p))[:, None]).T @ x)
    far, _ = fit_logistic(x, y, np.array([40.0, -40.0, 40.0]), ridge=1e-6)  # a start where Newton overshoots
    np.testing.assert_allclose(far, weights, atol=1e-2)


def test_area_under_the_curve() -> None:
    assert auc(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0])) == 1.0
    assert auc(np.array([3.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0])) == 0.25
    assert auc(np.array([1.0]), np.array([1.0])) is None


def test_acceptance_weights_help_where_confidence_tells(traces: list[Trace]) -> None:
    tokens = tokens_from_traces(traces)
    train, held = split_by_prompt(tokens.prompt, 0.25)
    arrays = train_acceptance(tokens[train])
    score = evaluate_acceptance(arrays, tokens[held])
    assert score["after"]["auc"] > 0.65
    assert score["after"]["log_loss"] < score["log_loss_of_mean"]
    bare = dict(zip(("before", "after"), prior_means(), strict=True)) | {"history": np.zeros(SHAPE)}
    untrained = evaluate_acceptance(bare, tokens[held])
    assert score["after"]["log_loss"] < untrained["after"]["log_loss"]


def test_shipped_weights_are_described_by_their_card() -> None:
    if not DEFAULT_WEIGHTS.exists():
        pytest.skip("no weights have been trained yet")
    card = json.loads(DEFAULT_WEIGHTS.with_suffix(".json").read_text())
    with np.load(DEFAULT_WEIGHTS) as file:
        assert int(file["n_records"]) == card["data"]["rows"]
        assert float(file["noise_var"]) == card["noise_var"]
    assert load_weights(DEFAULT_WEIGHTS).phi_cov is not None
    assert card["features"] == "causal"
    assert card["held_out"]["mse"] < card["held_out"]["mse_of_mean_per_level_and_gamma"]


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
    card = json.loads((tmp_path / "w" / "online.json").read_text())
    assert (card["levels"], card["data"]["traces"]) == (["fp16"], 5)
