"""Evaluation: its arithmetic by hand, the released records as published, and both protocols through the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from speckv_online.cli.app import main
from speckv_online.cli.jobs import run_job
from speckv_online.errors import UserError
from speckv_online.evaluation.command import evaluate
from speckv_online.evaluation.paper import Check, paper_protocol
from speckv_online.evaluation.policies import Realised, policy_tables
from speckv_online.evaluation.predictors import brier, mean_rates, reliability
from speckv_online.evaluation.release_runs import Run, best_gamma_by_task, read_runs
from speckv_online.evaluation.released import _match, dinkelbach, fixed_policies, step_seconds
from speckv_online.evaluation.replayed import fixed_policies as replayed_policies
from speckv_online.io.tables import Table
from speckv_online.simulate.cost_table import RTX3090_RELEASE
from speckv_online.simulate.simulator import replay_fixed
from speckv_online.traces.trace import Trace
from speckv_online.training.mlp16 import Data
from speckv_online.training.splits import folds, held_out_splits
from speckv_online.training.step_table import read_rows
from tests.support.made_traces import made_trace
from tests.support.release import RELEASE, made_release

STEPS, EXPERIMENTS = RELEASE / "phase2_step_results.csv", RELEASE / "phase2_experiment_results.csv"
released = pytest.mark.skipif(not STEPS.exists(), reason="the release's records are not here")

#: Stated figures whose last digit depends on the version of scikit-learn, or on folds that were not stated.
UNSETTLED = {
    "test correlation, RF-100": 0.001,
    "interval over rows, RF-100, mean": 0.005,
    "interval over rows, RF-100, low": 0.005,
    "interval over rows, RF-100, high": 0.005,
    "correlation, whole prompts held out": 0.005,
}


def test_a_figure_is_the_same_only_to_its_last_digit() -> None:
    assert Check("x", "published", "5.82", 5.8249).same
    assert not Check("x", "published", "5.82", 5.8251).same
    assert Check("x", "published", "-10", -9.85).same
    assert Check("x", "published", "0.300", 0.29991).reproduced == "0.300"
    assert not Check("x", "published", "0.834", 0.8345001).same


def test_tables_are_the_same_in_csv_and_markdown() -> None:
    table = Table("t", "Title", ("name", "value"), digits=2)
    table.add("a|b", 1.239)
    table.add("none", float("nan"))
    assert list(csv.reader(table.csv().splitlines())) == [["name", "value"], ["a|b", "1.239"], ["none", ""]]
    assert table.markdown().splitlines()[2:] == ["| name | value |", "|---|---:|", "| a\\|b | 1.24 |", "| none | – |"]
    with pytest.raises(ValueError, match="2 columns"):
        table.add("a")


def test_brier_score_and_reliability_count_tokens() -> None:
    # Four tokens of which one was accepted, forecast 0.5; two of two accepted, forecast 1.
    p, y, k = np.array([0.5, 1.0]), np.array([0.25, 1.0]), np.array([4.0, 2.0])
    assert brier(p, y, k) == pytest.approx((4 * 0.25 + 2 * 0.0) / 6)
    assert reliability(p, y, k) == [(0.5, 0.25, 1), (1.0, 1.0, 1)]
    assert reliability(np.array([0.41, 0.49]), np.array([0.0, 1.0]), np.array([1.0, 3.0])) == [
        (pytest.approx(0.47), 0.75, 2)
    ]


def test_a_level_that_was_never_seen_gets_the_mean_of_its_gamma() -> None:
    x = np.zeros((3, 6))
    x[:, -1] = [2, 2, 4]
    names = (np.array(["a", "b", "c"]), np.array(["fp16", "int8", "fp16"]), np.array(["chat"] * 3))
    inside = Data(x, np.array([0.2, 0.6, 0.9]), *names)
    outside = Data(np.array([[0, 0, 0, 0, 0, g] for g in (2, 2, 8)], float), np.zeros(3), names[0],
                   np.array(["fp16", "nf4", "nf4"]), names[2])  # fmt: skip
    np.testing.assert_allclose(mean_rates(inside, outside), [0.2, 0.4, 1.7 / 3])


def test_splits_hold_out_whole_prompts_tasks_and_levels() -> None:
    prompt = np.array([f"{t}-{i}" for t in ("code", "chat") for i in range(5) for _ in range(3)])
    task, level = np.array([p.split("-")[0] for p in prompt]), np.array(["fp16", "int8", "nf4"] * 10)
    masks = folds(prompt, task)
    assert (np.sum(masks, axis=0) == 1).all()
    for out in masks:
        assert not set(prompt[out]) & set(prompt[~out])
        assert set(task[out]) == {"code", "chat"}
    data = Data(np.zeros((30, 6)), np.zeros(30), prompt, level, task)
    parts = held_out_splits(data)
    assert list(parts) == ["prompts", "task chat", "task code", "level fp16", "level int8", "level nf4"]
    assert set(level[~parts["level int8"][0]]) == {"fp16", "nf4"}
    with pytest.raises(UserError, match="two prompts"):
        folds(np.array(["a", "a"]), np.array(["chat", "chat"]))


def test_the_price_of_time_is_the_best_rate() -> None:
    rng = np.random.default_rng(1)
    tokens, cost = rng.random((6, 2)) * 4 + 1, np.array([1.0, 2.5])
    every = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    best = max(tokens[np.arange(6), pick].sum() / cost[pick].sum() for pick in every)
    assert dinkelbach(tokens, cost) == pytest.approx(best)


def test_fixed_policies_of_a_release_are_plain_quotients(tmp_path: Path) -> None:
    steps, experiments = made_release(tmp_path)
    rows, runs = read_rows(steps), read_runs(experiments)
    found = {(r.level, r.policy): r for r in fixed_policies(runs)}
    four = found["nf4", "fixed:4"]
    tokens = sum(r.tokens_produced for r in rows if (r.compression, r.gamma) == ("nf4", 4))
    assert sum(four.tokens.values()) == tokens
    assert sum(four.seconds.values()) == pytest.approx(6 * 12 * 0.24)
    best = found["nf4", "best fixed"]
    assert best.kind == "hindsight"
    assert best.gammas == four.gammas  # a verify that takes 0.2 s is worth a long draft
    # A policy that always chooses 4 matches the steps of gamma 4, and they are all there is to it.
    seconds = step_seconds(rows, runs)
    matched = {r.level: r for r in _match("always 4", rows, np.full(len(rows), 4), seconds)}
    for prompt, spent in four.seconds.items():
        rate = matched["nf4"].tokens[prompt] / matched["nf4"].seconds[prompt]
        assert rate == pytest.approx(four.tokens[prompt] / spent)
    assert matched["nf4"].gammas == {4: 144}
    with pytest.raises(UserError, match="two files of one release"):
        step_seconds(rows[:-1], runs)
    with pytest.raises(UserError, match="no experiment"):
        step_seconds(rows, runs[:-1])


def test_the_task_oracle_takes_the_best_mean_of_speeds() -> None:
    def run(gamma: int, speed: float) -> Run:
        return Run("nf4", gamma, "code", "p", 10, 10 / speed, speed, 4, "code-1")

    assert best_gamma_by_task([run(2, 10), run(2, 10), run(4, 3), run(4, 18)]) == {("nf4", "code"): 4}


def test_ratios_are_paired_by_prompt_and_hindsight_is_labelled() -> None:
    base, twice = Realised("nf4", "fixed:4"), Realised("nf4", "mine", "hindsight")
    for p, seconds in (("a", 1.0), ("b", 3.0), ("c", 9.0)):
        base.add(p, 10, seconds, {4: 3})
        twice.add(p, 10, seconds / 2, {8: 1, 2: 3})
    policies, cells, shares = policy_tables([base, twice], {"a": "code", "b": "code", "c": "chat"}, "modelled", 200)
    row = dict(zip(policies.columns, policies.rows[1], strict=True))
    assert row["tokens/s"] == pytest.approx(30 / 6.5)
    assert row["kind"] == "hindsight"
    assert [row[c] for c in ("ratio", "ratio low", "ratio high")] == pytest.approx([2.0] * 3)
    gains = [["nf4", task, "mine", pytest.approx(100.0)] for task in ("code", "chat")]
    assert [r for r in cells.rows if r[2] == "mine"] == gains
    assert [r for r in shares.rows if r[1] == "mine"] == [["nf4", "mine", 2, 0.75], ["nf4", "mine", 8, 0.25]]


def test_replayed_baselines_add_up_and_hindsight_bounds_them() -> None:
    traces = [made_trace(p, level, 24, task) for p, task in ((1, "code"), (8, "chat")) for level in ("fp16", "nf4")]
    found = {(r.level, r.policy): r for r in replayed_policies(traces, RTX3090_RELEASE)}
    speed = {key: sum(r.tokens.values()) / sum(r.seconds.values()) for key, r in found.items()}
    replay = replay_fixed(traces[1], 2, RTX3090_RELEASE.level("nf4"))
    assert found["nf4", "fixed:2"].seconds["p1"] == pytest.approx(float(replay.seconds.sum()))
    for level in ("fp16", "nf4"):
        fixed = max(speed[level, p] for p in ("autoregressive", "fixed:1", "fixed:2", "fixed:4", "fixed:6", "fixed:8"))
        assert fixed <= speed[level, "best fixed"] <= speed[level, "best per task"] <= speed[level, "clairvoyant"]
        assert found[level, "clairvoyant"].kind == "hindsight"
        assert set(found[level, "clairvoyant"].tokens.values()) == {24}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    for p in range(6):
        for level in ("fp16", "nf4"):
            trace: Trace = made_trace(p, level, 20, ("code", "chat")[p % 2])
            trace.save(folder / level / f"p{p}.npz")
    RTX3090_RELEASE.save(folder / "cost.json")
    return folder


def test_honest_on_traces_through_the_command(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["evaluate", "--protocol", "honest", str(traces), "--out", str(out), "--json"]
    assert main([*arguments, "--resamples", "100", "--epochs", "5"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    names = {"policies", "improvement", "gamma_share", "predictions", "reliability", "importance", "estimators"}
    names |= {"speed_by_gamma", "acceptance_by_level", "signals"}
    assert set(tables) == names
    assert {p.stem for p in out.glob("*.csv")} == names
    assert {p.stem for p in out.glob("*.png")} == names - {"predictions", "importance"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png"))
    report = (out / "report.md").read_text()
    assert "modelled" in report
    assert "hindsight" in report
    held = {(r["features"], r["held out"]) for r in tables["predictions"]}
    parts = ("prompts", "task chat", "task code", "level fp16", "level nf4")
    assert held == {(f, part) for f in ("step-mean", "causal") for part in parts}
    assert all(0 <= r["Brier"] <= 1 for r in tables["predictions"])
    for policy in ("mlp16", "mlp16:tokens_per_step", "online"):
        for suffix in ("", ", task held out", ", level held out"):
            rows = [r for r in tables["policies"] if r["policy"] == policy + suffix]
            assert [r["prompts"] for r in rows] == [6, 6]
            # Whatever it decides, no policy beats the oracle by much: the oracle is greedy in its own steps.
            for r in rows:
                top = next(x for x in tables["policies"] if (x["level"], x["policy"]) == (r["level"], "clairvoyant"))
                assert r["tokens/s"] <= top["tokens/s"] * 1.05


def test_honest_on_records_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, _ = made_release(tmp_path)
    arguments = ["evaluate", "--protocol", "honest", str(steps), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--resamples", "100", "--epochs", "60"]) == 0
    shown = capsys.readouterr().out
    assert "matched" in shown
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = {(r["features"], r["held out"]): r for r in csv.DictReader(file)}
    # The made-up signals of a step tell its own acceptance, and nothing of the next one's.
    assert float(rows["step-mean", "prompts"]["correlation"]) > 0.4
    assert float(rows["causal", "prompts"]["correlation"]) < 0.25


def test_a_level_may_lack_a_gamma_that_another_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = made_release(tmp_path)
    for path in paths:
        path.write_text("".join(x for x in path.read_text().splitlines(True) if not x.startswith("nf4,4,")))
    arguments = ["evaluate", "--protocol", "honest", str(paths[0]), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--resamples", "100", "--epochs", "2"]) == 0
    assert "MLP16 causal, tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--protocol", "paper", "."], "is a directory"),
        (["--protocol", "paper", "nowhere_step.csv"], "nowhere_step.csv"),
        (["--protocol", "honest", "nowhere.csv"], "nowhere.csv"),
        (["--protocol", "honest", ".", "--resamples", "1"], "--resamples"),
        (["--protocol", "honest", ".", "--experiment", "e.csv"], "--experiment goes with a CSV"),
        (["--protocol", "honest", "r.csv", "--cost", "cost.json"], "--cost goes with a directory of traces"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_results_that_have_no_place_are_refused_before_the_work(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["evaluate", "--protocol", "honest", str(traces), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "choose another --out" in error
    assert error.count("\n") == 1


def test_records_need_their_experiments_and_the_paper_its_grid(tmp_path: Path) -> None:
    steps, experiments = made_release(tmp_path)
    with pytest.raises(UserError, match="not the release's"):
        evaluate("paper", steps, out=tmp_path / "out")
    other = experiments.rename(tmp_path / "elsewhere.csv")
    with pytest.raises(UserError, match="--experiment"):
        evaluate("honest", steps, out=tmp_path / "out")
    with pytest.raises(UserError, match="not the release's"):
        evaluate("paper", steps, experiment=other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_jobs_are_handed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, _ = made_release(tmp_path)
    arguments = ["train", "--records", str(steps), "--compare", "--epochs", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "RF-100" in capsys.readouterr().out
    card = json.loads((tmp_path / "mlp16.json").read_text())
    models = [row["model"] for row in card["compared"]]
    assert models == ["MLP16 (torch)", "Ridge", "MLP-16", "MLP-32", "RF-10", "RF-100"]
    assert main(["profile", "--levels", ""]) == 2
    assert "--levels is empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="experiments package"):
        run_job("no_such_job", [])


@released
def test_the_published_evaluation_comes_out_to_the_last_digit() -> None:
    checks, tables = paper_protocol(read_rows(STEPS), read_runs(EXPERIMENTS), lambda _: None)
    assert len(checks) == 117
    for check in checks:
        if check.figure in UNSETTLED:
            assert check.value == pytest.approx(float(check.stated), abs=UNSETTLED[check.figure]), check.figure
        else:
            assert check.same, f"{check.figure}: stated {check.stated}, reproduced {check.reproduced}"
    share = {(r[0], r[1]): r[2] for t in tables if t.name == "gamma_share" for r in t.rows}
    assert sum(share[level, 8] for level in ("fp16", "int8", "nf4")) / 3 == pytest.approx(0.93, abs=0.01)


@released
def test_the_release_s_last_steps_drafted_less_than_gamma() -> None:
    rows = read_rows(STEPS)
    assert sum(r.drafted < r.gamma for r in rows) == 165
    assert all(abs(r.acceptance_rate - r.accepted / r.drafted) < 1e-3 for r in rows)
