"""Training MLP16: what it recovers from made-up data, what it holds out, and what the command writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.train import describe, main
from policies.acceptance.context_table import SHAPE
from policies.acceptance.features import token_features
from policies.acceptance.model import prior_means
from policies.base import Context
from policies.learned.mlp16 import DEFAULT_WEIGHTS, Mlp16, load_weights
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
from speckv_online.training.mlp16 import Data, data_from_rows, data_from_traces, evaluate, split_by_prompt, train_mlp16
from speckv_online.training.step_table import COLUMNS, RELEASE_COLUMNS, read_rows, trace_rows, write_rows
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


def test_causal_and_step_mean_features_differ_in_time() -> None:
    trace = made_trace(4, length=20)
    rows = trace_rows([trace])
    causal, step_mean = data_from_rows(rows), data_from_rows(rows, "step-mean")
    np.testing.assert_array_equal(causal.y, step_mean.y)
    played = [r for r in rows if r.drafted]
    for i, row in enumerate(played):
        t, k = row.position, row.drafted
        assert step_mean.x[i, 1] == pytest.approx(trace.signals[t, :k, 1].mean())
        if row.schedule.startswith("fixed") and row.step:
            before = played[i - 1]
            assert causal.x[i, 1] == pytest.approx(trace.signals[before.position, : before.drafted, 1].mean())


def test_rows_round_trip_and_start_with_the_release_s_columns(tmp_path: Path) -> None:
    rows = trace_rows([made_trace(3, length=15)])
    path = write_rows(tmp_path / "steps.csv", rows)
    header = path.read_text().splitlines()[0]
    assert header == ",".join(COLUMNS)
    assert header.startswith(
        "compression,gamma,task,step,accepted,acceptance_rate,tokens_produced,mean_draft_entropy,"
        "mean_draft_confidence,max_draft_entropy,min_draft_confidence,"
    )
    for row, again in zip(rows, read_rows(path), strict=True):
        for name in COLUMNS:
            a, b = getattr(row, name), getattr(again, name)
            assert a == b or a == pytest.approx(b, rel=1e-5, nan_ok=True), name
    # A reset of the sequence: a run of steps adds up to the whole output under every schedule.
    totals = {name: sum(r.tokens_produced for r in rows if r.schedule == name) for name in {r.schedule for r in rows}}
    assert set(totals.values()) == {15}
    assert any(r.drafted == 0 and np.isnan(r.acceptance_rate) for r in rows)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("compression,gamma\nfp16,2\n", "lacks the columns task"),
        (",".join(RELEASE_COLUMNS) + "\n", "no step records"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        read_rows(path)


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
    for name in ("mlp16", "online", "goodput"):
        policy = make_policy(name, weights=str(out), acceptance=str(out.with_name("goodput.npz")))
        replay = Simulator(policy, RTX3090_RELEASE).run(traces[:4])
        assert replay.tokens == sum(len(t) for t in traces[:4])


def test_command_trains_on_records_too(traces: list[Trace], tmp_path: Path) -> None:
    write_rows(tmp_path / "steps.csv", trace_rows(traces[:8]))
    arguments = ["--records", str(tmp_path / "steps.csv"), "--features", "step-mean", "--epochs", "2", "--seeds", "1"]
    assert main([*arguments, "--out", str(tmp_path / "w")]) == 0
    assert not (tmp_path / "w" / "goodput.npz").exists()
    assert json.loads((tmp_path / "w" / "mlp16.json").read_text())["data"]["kind"] == "step records"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "either --traces"),
        (["--traces", "nowhere"], "nowhere"),
        (["--records", "nowhere.csv"], "nowhere.csv"),
        (["--records", "a.csv", "--features", "psychic"], "psychic"),
        (["--records", "a.csv", "--gammas", "0,2"], "from 1 to 16"),
        (["--records", "a.csv", "--more", "others"], "--more adds traces to --traces"),
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


@pytest.mark.skipif(not RECORDS.exists(), reason="the release's records are not here")
def test_release_records_read_as_published() -> None:
    rows = read_rows(RECORDS)
    assert len(rows) == 5112
    assert len({r.prompt_id for r in rows}) == 20
    fours = [r.tokens_produced for r in rows if r.gamma == 4]
    assert np.mean(fours) == pytest.approx(3.76, abs=0.005)
    data = data_from_rows(rows, "step-mean")
    fit = train_mlp16(data, epochs=60, seeds=[0])
    assert 0.5 < fit.metrics["correlation"] < 0.8  # 0.651 with whole prompts held out, cross-validated


def test_cards_name_no_directory_of_a_machine(tmp_path: Path) -> None:
    trace = made_trace(0)
    trace.meta["target"] = str(tmp_path / "a-model")
    assert describe([trace])["target"] == ["a-model"]
    assert describe([trace])["draft"] == [trace.meta.get("draft")]


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
