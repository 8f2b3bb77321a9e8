"""The comparison job: configuration, learner, worker, a whole local run, and its report."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.compare import main
from experiments.config import CompareConfig, add_options, load_yaml, parse, split_specs
from experiments.learner import Key, Learner, Merged, checkpoint_name, read_checkpoint
from experiments.runner import Job, plan, run_local
from experiments.worker import Worker
from policies.base import Context, Decision, Outcome, Policy, PolicyError, State
from policies.mlp16 import SHAPES
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.prompts import Prompt
from speckv_online.report import build_report, to_json, to_markdown, to_text, write_report
from speckv_online.rundir import StepWriter, Unit, read_manifest, read_units
from speckv_online.stats import Estimate
from tests.conftest import TinyPair
from tests.test_rundir import STEP

PROMPTS = [Prompt("p0", "chat", "hello"), Prompt("p1", "code", "x = 1"), Prompt("p2", "math", "2+2")]


class Counter(Policy):
    """Drafts two tokens and counts what it has learnt, in a form that adds up."""

    summary = "counts"
    learns = True

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.total, self.fresh = 0.0, 0.0

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(2, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if self.first_time(decision.id):
            self.total += outcome.produced
            self.fresh += outcome.produced

    def state_dict(self) -> State:
        return {"total": np.array(self.total)}

    def load_state_dict(self, state: State) -> None:
        if set(state) != {"total"}:
            raise PolicyError("not a counter's state")
        self.total, self.fresh = float(state["total"]), 0.0

    def take_delta(self) -> State:
        delta, self.fresh = {"total": np.array(self.fresh)}, 0.0
        return delta

    def merge(self, delta: State) -> None:
        self.total += float(delta["total"])


class Hermit(Counter):
    """Learns as :class:`Counter` does, but shares nothing."""

    def take_delta(self) -> State:
        return {}


COUNTER, HERMIT = "tests.test_compare:Counter", "tests.test_compare:Hermit"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random MLP16 weights, so that tests need no trained ones."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("weights") / "mlp16.npz"
    np.savez(path, **{key: rng.normal(0, 0.3, shape) for key, shape in SHAPES.items()})
    return str(path)


@pytest.fixture
def config(tiny_pair: TinyPair) -> CompareConfig:
    return CompareConfig(
        target=str(tiny_pair.target_dir), draft=str(tiny_pair.draft_dir), levels=("fp32", "fp16"),
        policies=("autoregressive", "fixed:2", COUNTER), max_new_tokens=12, threads=1, device="cpu", local=True,
    )  # fmt: skip


def flags(config: CompareConfig, *more: object) -> list[str]:
    pairs = {f"--{k.replace('_', '-')}": v for k, v in asdict(config).items() if v != getattr(CompareConfig, k)}
    found = [x for k, v in pairs.items() if v is not True for x in (k, ",".join(v) if isinstance(v, tuple) else str(v))]
    return [*found, *(k for k, v in pairs.items() if v is True), *map(str, more)]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "task": p.task, "prompt": p.text}) + "\n" for p in PROMPTS))
    return path


# -- configuration ----------------------------------------------------------------------------------------------------


def test_specs_may_hold_commas_of_their_own() -> None:
    assert split_specs("autoregressive, fixed:4,online:strength=9,explore=ucb,mlp16") == (
        "autoregressive", "fixed:4", "online:strength=9,explore=ucb", "mlp16",
    )  # fmt: skip
    assert split_specs("fp16") == ("fp16",)
    assert split_specs(" , ") == ()


def test_every_flag_is_documented_and_read() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, CompareConfig)
    text = parser.format_help()
    for name, value in asdict(CompareConfig()).items():
        assert f"--{name.replace('_', '-')}" in text
        assert isinstance(value, str | int | bool | tuple | None)
    read = parse(CompareConfig, ["--levels", "nf4", "--seed", "3", "--local", "--policies", "fixed:1,fixed:2"], "x", "")
    assert read == replace(CompareConfig(), levels=("nf4",), seed=3, local=True, policies=("fixed:1", "fixed:2"))


def test_yaml_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("levels: [int8, nf4]\npolicies: fixed:1,fixed:2\nprompts: 3\nmax-new-tokens: 7\n")
    read = parse(CompareConfig, ["--config", str(path), "--max-new-tokens", "9"], "x", "")
    assert read == replace(
        CompareConfig(), levels=("int8", "nf4"), policies=("fixed:1", "fixed:2"), prompts="3", max_new_tokens=9
    )
    for text, message in (
        ("level: fp16", "unknown setting 'level'"),
        ("seed: yes", "seed must be of type int"),
        ("local: 1", "local must be of type bool"),
        ("levels: [1]", "levels must be a list of names"),
        ("- a", "not a mapping"),
        ("a: [", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_yaml(CompareConfig, path)
    with pytest.raises(UserError, match="cannot read"):
        load_yaml(CompareConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["compare", "quick", "orders"])
def test_shipped_configs_are_valid(name: str) -> None:
    path = Path(__file__).parents[1] / "experiments" / "configs" / f"{name}.yaml"
    config = CompareConfig(**load_yaml(CompareConfig, path))
    if name == "compare":
        assert config == CompareConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": ()}, "--levels is empty"),
        ({"policies": ("fixed:1", "fixed:1")}, "--policies names something twice"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"orders": 0}, "--orders"),
        ({"threads": -1}, "--threads"),
        ({"target": "x"}, "go together"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompareConfig(**values)


def test_threads_never_exceed_the_cores() -> None:
    for cores in (1, 2, 3, 7, 8, 64):
        for threads in (0, 1, 2, 5):
            if threads > cores:
                with pytest.raises(UserError, match="more than the"):
                    plan(threads, 3, [cores])
                continue
            schedule = plan(threads, 3, [cores])
            assert 1 <= schedule.slots <= 3
            assert schedule.slots * schedule.threads <= cores
    assert plan(0, 3, [2]).describe(3)["levels"] == "one after the other"
    assert plan(1, 3, [8]).describe(3)["levels"] == "side by side"
    assert plan(1, 3, [2]).describe(3)["levels"] == "up to 2 at a time"
    assert plan(4, 3, [4, 4]).slots == 2  # two machines
    assert plan(3, 3, [4, 4]).slots == 2  # a worker does not stretch over two machines


# -- learner ----------------------------------------------------------------------------------------------------------


def delta(total: float) -> State:
    return {"total": np.array(total)}


def test_a_batch_counts_once_however_often_it_arrives(tmp_path: Path) -> None:
    key: Key = (COUNTER, 0)
    learner = Learner(tmp_path)
    assert learner.sync("fp16", -1, {key: {}}) == {key: (0, {})}
    assert learner.sync("fp16", 0, {key: delta(3)})[key] == (1, {"total": 3.0})
    assert learner.sync("fp16", 0, {key: delta(3)})[key] == (1, {"total": 3.0})
    assert learner.sync("nf4", 0, {key: delta(4)})[key] == (2, {"total": 7.0})
    assert learner.sync("nf4", 2, {key: delta(1)})[key] == (3, {"total": 8.0})  # out of order
    assert learner.sync("nf4", 1, {key: delta(1)})[key] == (4, {"total": 9.0})
    assert learner.sync("nf4", 0, {(COUNTER, 1): delta(1)})[COUNTER, 1] == (1, {"total": 1.0})  # another order

    again = Learner(tmp_path)  # restarted: takes its checkpoints up and still knows what it has added
    assert again.sync("fp16", 0, {key: delta(3)})[key] == (4, {"total": 9.0})
    state, applied = read_checkpoint(tmp_path / checkpoint_name(key))
    assert (state, len(applied)) == ({"total": 9.0}, 4)


def test_merged_statistics_of_online_are_those_of_one_process(tmp_path: Path, weights: str) -> None:
    spec = f"online:weights={weights},explore=greedy,safety=off"
    alone, learner = make_policy(spec), Learner(tmp_path)
    workers = {level: make_policy(spec, worker=i) for i, level in enumerate(("fp16", "nf4"))}
    rng = np.random.default_rng(0)
    merged: Merged = (0, {})
    for batch in range(4):
        for level, policy in workers.items():
            for _ in range(5):
                context = Context(level=level, mean_entropy=float(rng.uniform(0, 4)), acceptance=float(rng.uniform()))
                k = int(rng.integers(1, 8))
                n = int(rng.integers(0, k + 1))
                outcome = Outcome(k, n, min(n + 1, k), n + 1, 0.1, 0.02, 0.07, level)
                for p in (policy, alone):
                    decision = p.decide(context)
                    p.learn(decision, outcome)
            merged = learner.sync(level, batch, {(spec, 0): policy.take_delta()})[spec, 0]
    assert merged[0] == 8
    expected = alone.state_dict()
    assert set(merged[1]) == set(expected)
    for key, value in expected.items():
        if key.startswith("head."):
            np.testing.assert_allclose(merged[1][key], value, rtol=1e-9, atol=1e-12)


def test_checkpoint_names_are_file_names_and_differ() -> None:
    keys = [("online", 0), ("online", 1), ("online:strength=2", 0), ("online:strength,2", 0), ("a/b:../c", 0)]
    names = [checkpoint_name(key) for key in keys] + [checkpoint_name(("online", 0), "nf4")]
    assert len(set(names)) == len(names)
    assert names[0] == "policy-online-seed-0.npz"
    assert all("/" not in name for name in names)


# -- worker and local runs --------------------------------------------------------------------------------------------


def test_policies_are_interleaved_prompt_by_prompt_and_take_turns(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, orders=2, levels=("fp32",))
    events = list(run_local(Job(config, PROMPTS, tmp_path, 1)))
    assert [e.kind for e in events] == ["loading", "ready", *["unit"] * 18, "finished"]
    units = [r.unit for r in read_units(tmp_path)]
    blocks = [units[i : i + 3] for i in range(0, 18, 3)]
    assert all(len({u.prompt for u in block}) == 1 and len({u.policy for u in block}) == 3 for block in blocks)
    assert [block[0].policy for block in blocks] == list(config.policies) * 2
    orders = [[block[0].prompt for block in blocks if block[0].seed == seed] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == ["p0", "p1", "p2"]
    assert orders[0] != orders[1]


def test_statistics_are_merged_across_levels_and_counted_once(config: CompareConfig, tmp_path: Path) -> None:
    list(run_local(Job(config, PROMPTS, tmp_path, 1)))
    results = read_units(tmp_path)
    mine = [r for r in results if r.unit.policy == COUNTER]
    state, applied = read_checkpoint(tmp_path / checkpoint_name((COUNTER, 0)))
    assert float(state["total"]) == sum(r.tokens for r in mine)  # both levels, each step once
    assert sorted(applied) == [(level, i) for level in ("fp16", "fp32") for i in range(3)]
    assert [r.facts["merged_version"] for r in mine if r.unit.level == "fp16"] == [3, 4, 5]  # fp32 came first


def test_a_policy_that_shares_nothing_is_checkpointed_per_level(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, policies=(HERMIT,))
    list(run_local(Job(config, PROMPTS, tmp_path, 1)))
    for level in config.levels:
        state, _ = read_checkpoint(tmp_path / checkpoint_name((HERMIT, 0), level))
        assert float(state["total"]) == sum(r.tokens for r in read_units(tmp_path) if r.unit.level == level)


def test_a_run_that_was_cut_off_goes_on_without_counting_twice(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, levels=("fp32",))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    list(run_local(Job(config, PROMPTS, whole, 1)))
    events = run_local(Job(config, PROMPTS, cut, 1))
    for _ in range(7):  # loading, ready, five units: in the middle of the second prompt
        next(events)
    events.close()
    assert len(read_units(cut)) == 5
    rest = [e for e in run_local(Job(config, PROMPTS, cut, 1)) if e.kind == "unit"]
    assert len(rest) == 4

    outputs = {r.unit.key: r.facts["output"] for r in read_units(whole)}
    assert {r.unit.key: r.facts["output"] for r in read_units(cut)} == outputs
    assert not [e for e in run_local(Job(config, PROMPTS, cut, 1)) if e.kind == "unit"]  # nothing is left to do


def test_an_endless_prompt_is_refused_before_anything_is_decoded(config: CompareConfig, tmp_path: Path) -> None:
    prompts = [*PROMPTS, Prompt("epic", "chat", "x" * 600)]
    events = run_local(Job(config, prompts, tmp_path, 1))
    assert next(events).kind == "loading"
    with pytest.raises(UserError, match="prompt epic has 600 tokens"):
        next(events)


def test_a_faulty_policy_is_counted(config: CompareConfig, tmp_path: Path) -> None:
    worker = Worker(
        replace(config, policies=("tests.test_compare:Faulty",)), "fp32", 0, 1, PROMPTS, tmp_path,
        lambda worker, sequence, deltas: dict.fromkeys(deltas, (0, {})),
    )  # fmt: skip
    while worker.advance() is not None:
        pass
    assert worker.finish()["faults"]["tests.test_compare:Faulty seed 0"] > 0
    assert {len(r.facts["output"]) for r in read_units(tmp_path)} <= set(range(1, 13))


class Faulty(Counter):
    """Raises every time."""

    def decide(self, context: Context) -> Decision:
        raise RuntimeError("no idea")


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_whole_run(
    config: CompareConfig, prompts_file: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    learned = f"mlp16:weights={weights}", f"online:weights={weights}"
    config = replace(config, policies=("autoregressive", "fixed:2", *learned))
    assert main(flags(config, "--prompts", prompts_file, "--out", out)) == 0
    shown = capsys.readouterr()
    assert f"Run: {out}" in shown.out
    assert [line.split()[1] for line in shown.out.splitlines() if line.startswith("fp32 ")] == list(config.policies)
    assert "fp16 12/12 " in shown.err  # progress
    for name in ("run.json", "config.yaml", "steps-fp32.jsonl", "steps-fp16.jsonl", "report.md", "report.json"):
        assert (out / name).stat().st_size > 0
    assert (out / "plots" / "goodput.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("policy-online-*.npz"))

    manifest = read_manifest(out)
    assert manifest["status"] == "finished"
    assert manifest["schedule"]["levels"] == "one after the other"
    assert manifest["schedule"]["threads_per_worker"] == 1
    assert {w["threads"] for w in manifest["workers"].values()} == {1}
    assert "rounded to fp16, arithmetic in fp32" in manifest["workers"]["fp16"]["arithmetic"]
    assert len(manifest["workers"]["fp32"]["models"]["target"]["sha256"]["model.safetensors"]) == 64
    assert manifest["software"]["torch"]
    assert str(tmp_path) not in json.dumps(manifest["config"])  # a manifest can be passed on
    assert yaml.safe_load((out / "config.yaml").read_text())["levels"] == ["fp32", "fp16"]

    rows = json.loads((out / "report.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        steps = [
            s
            for r in read_units(out)
            if (r.unit.level, r.unit.policy) == (row["level"], row["policy"])
            for s in r.steps
        ]
        assert row["tokens_per_second"]["value"] == pytest.approx(
            sum(s.produced for s in steps) / sum(s.seconds for s in steps)
        )
        assert row["same_output"] == row["compared"]
    assert main(flags(config, "--prompts", prompts_file, "--out", out, "--json")) == 0  # all done: the report only
    assert json.loads(capsys.readouterr().out)["rows"] == rows


@pytest.mark.slow
def test_the_default_policies_on_the_real_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompts", "1", "--max-new-tokens", "6", "--levels", "nf4", "--local", "--json", "--threads", "1"]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in report["rows"]] == list(CompareConfig().policies)
    assert all(row["tokens"] == 6 for row in report["rows"])
    assert (tmp_path / "run" / "policy-online-seed-0.npz").exists()
    assert any("4 bits before" in note for note in report["notes"])


def test_mistakes_are_refused_before_a_model_is_loaded(
    config: CompareConfig, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"task":"chat","prompt":"x"}\n{"task"\n')
    for more, message in (
        (["--policies", "fixd"], "unknown policy 'fixd'"),
        (["--levels", "int3"], "unknown compression level 'int3'"),
        (["--prompts", "0"], "at least 1"),
        (["--prompts", tmp_path / "absent"], "cannot read the prompts file"),
        (["--prompts", tmp_path / "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
        (["--out", tmp_path / "file" / "run"], "cannot write to"),
        (["--out", tmp_path], "neither empty nor a run directory"),
        (["--threads", 4096], "--threads 4096 is more than the"),
        (["--target", tmp_path / "absent"], "no model folder"),
    ):
        out = tmp_path / "out"
        code = main(flags(config, "--prompts", prompts_file, "--out", out, *more))
        shown = capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if not line.startswith("[")]  # progress lines aside
        assert code == 2, message
        assert len(errors) == 1
        assert errors[0].startswith("compare: error: ")
        assert message in errors[0]
        for left in out.glob("*"):
            left.unlink()


def test_a_ray_job_needs_an_absolute_output(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(flags(config, "--out", "runs/x")) == 2
    assert "absolute path" in capsys.readouterr().err


# -- report -----------------------------------------------------------------------------------------------------------


UNIT = Unit("nf4", "fixed:4", "p", "chat", 0)


def make_run(folder: Path, speeds: dict[tuple[str, str], float], prompts: int = 12, spread: float = 0.02) -> Path:
    """A run directory with made-up step times: tokens per second by level and policy."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for (level, policy), speed in speeds.items():
        writer = StepWriter(folder / f"steps-{level}.jsonl")
        for i in range(prompts):
            unit = replace(UNIT, level=level, policy=policy, prompt=f"p{i}")
            seconds = 3 / speed * (1 + i / 4) * rng.normal(1, spread)  # prompts differ, alike for all policies
            writer.write(unit, [replace(STEP, step=j, seconds=seconds) for j in range(4)], {"output": [i]})
        writer.close()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "config": {}, "hardware": {}, "workers": {}}))
    return folder


def test_the_verdict_says_no_more_than_the_intervals(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {
            ("fp16", "autoregressive"): 20, ("fp16", "online"): 19, ("fp16", "fixed:4"): 10,
            ("int8", "autoregressive"): 5, ("int8", "online"): 6, ("int8", "fixed:4"): 5.98,
            ("nf4", "autoregressive"): 7, ("nf4", "online"): 7.01, ("nf4", "fixed:4"): 6,
        },
    )  # fmt: skip
    verdict = build_report(run).verdict
    assert verdict.count(".") >= 1
    fp16, int8, nf4 = verdict.rstrip(".").split("; at ")
    assert fp16.startswith("At fp16 autoregressive was fastest (")
    assert int8.startswith("int8 there was no clear difference between online and fixed:4 (up to ")
    assert int8.endswith(" times autoregressive)")
    assert "no clear difference between" in nf4
    assert "which may be chance" in nf4 or "autoregressive and online" in nf4


def test_few_prompts_are_called_few(tmp_path: Path) -> None:
    speeds = {("fp16", "autoregressive"): 20.0, ("fp16", "fixed:4"): 10.0}
    few = build_report(make_run(tmp_path / "few", speeds, prompts=2))
    assert few.verdict.startswith("On 2 prompts, too few to be sure: at fp16 ")
    one = build_report(make_run(tmp_path / "one", speeds, prompts=1))
    assert "no clear difference" in one.verdict
    assert any("single prompt" in note for note in one.notes)
    assert to_json(one)["rows"][1]["speedup"]["low"] is None
    assert "NaN" not in json.dumps(to_json(one))


def test_rows_and_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {("nf4", "autoregressive"): 10, ("nf4", "fixed:4"): 15})
    row = build_report(run).rows[1]
    assert (row.prompts, row.steps, row.tokens) == (12, 48, 144)
    assert (row.tokens_per_step, row.acceptance, row.mean_gamma) == (3, 0.5, 4)
    assert row.decision_microseconds == pytest.approx(10)
    assert isinstance(row.speedup, Estimate)
    assert row.speedup.value == pytest.approx(1.5, rel=0.05)
    assert 1.4 < row.speedup.low < row.speedup.value < row.speedup.high < 1.6


def test_a_report_without_a_baseline_or_with_missing_prompts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {("nf4", "fixed:2"): 10, ("nf4", "fixed:4"): 15})
    report = build_report(run)
    assert all(row.speedup is None for row in report.rows)
    assert "fixed:4 was fastest" in report.verdict
    other = make_run(tmp_path / "other", {("nf4", "autoregressive"): 10})
    writer = StepWriter(other / "steps-late.jsonl")
    writer.write(replace(UNIT, prompt="p3"), [STEP], {"output": [4]})  # one prompt so far, and not the same tokens
    report = write_report(other)
    assert report.rows[1].prompts == 1
    assert math.isnan(report.rows[1].speedup.low) if report.rows[1].speedup else False
    assert any("differ from autoregressive" in note and "fixed:4 1 of 1" in note for note in report.notes)
    assert (other / "plots" / "goodput.png").exists()


def test_text_and_markdown_show_every_row(tmp_path: Path) -> None:
    report = build_report(make_run(tmp_path / "run", {("fp16", "autoregressive"): 10, ("nf4", "fixed:4"): 15}))
    text, markdown = to_text(report), to_markdown(report)
    for shown in (text, markdown):
        assert "tokens/s" in shown
        assert "measured" in shown
        assert report.verdict in shown
    assert markdown.count("\n| ") == 3
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("fp16", "nf4"))] == [
        ["fp16", "autoregressive"], ["nf4", "fixed:4"],
    ]  # fmt: skip


def test_a_report_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import speckv_online.report; "
        "print([m for m in ('torch', 'transformers', 'ray', 'policies') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
