"""Comparison runs in one process: order of work, sharing, resuming, and the command with its report."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from experiments.compare.__main__ import main
from experiments.runtime.display import Display
from experiments.runtime.learner import Key, Learner, checkpoint_name, read_checkpoint
from experiments.runtime.local_runner import run_local
from experiments.runtime.ray_runner import connect
from experiments.runtime.run_manifest import RunManifest
from experiments.runtime.schedule import Node, plan
from experiments.runtime.settings import CompareConfig
from experiments.runtime.work_queue import Event, Job, Work, blocks
from experiments.runtime.worker import Worker
from speckv_online.errors import UserError
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import RunDir, StepWriter, read_manifest, read_units
from speckv_online.modeling.engine import ENGINES, EngineStatus
from tests.support.engine import SUPPORTED
from tests.support.records import STEP
from tests.support.runs import (
    COUNTER,
    FAULTY,
    HERMIT,
    PROMPTS,
    flags,
    free_port,
    make_config,
    write_prompts,
    write_weights,
)
from tests.support.tiny_models import TinyPair


@pytest.fixture
def config(tiny_pair: TinyPair) -> CompareConfig:
    return make_config(tiny_pair)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


def run(config: CompareConfig, out: Path, prompts: list[Prompt] = PROMPTS) -> list[Event]:
    return list(run_local(job(config, out, prompts)))


def job(config: CompareConfig, out: Path, prompts: list[Prompt] = PROMPTS) -> Job:
    return Job(config, prompts, out, plan(config, [Node(2)], len(prompts) * config.orders))


def test_policies_are_interleaved_prompt_by_prompt_and_take_turns(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, orders=2, levels=("fp32",))
    events = run(config, tmp_path)
    assert [e.kind for e in events] == ["loading", "ready", *["unit"] * 18, "finished"]
    units = [r.unit for r in read_units(tmp_path)]
    blocks = [units[i : i + 3] for i in range(0, 18, 3)]
    assert all(len({u.prompt for u in block}) == 1 and len({u.policy for u in block}) == 3 for block in blocks)
    assert [block[0].policy for block in blocks] == list(config.policies) * 2
    orders = [[block[0].prompt for block in blocks if block[0].seed == seed] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == ["p0", "p1", "p2"]
    assert orders[0] != orders[1]


def test_statistics_are_merged_across_levels_and_counted_once(config: CompareConfig, tmp_path: Path) -> None:
    run(config, tmp_path)
    results = read_units(tmp_path)
    mine = [r for r in results if r.unit.policy == COUNTER]
    state, applied = read_checkpoint(tmp_path / checkpoint_name((COUNTER, 0)))
    assert float(state["total"]) == sum(r.tokens for r in mine)  # both levels, each step once
    assert sorted(applied) == [(f"{level} p{i}", 0) for level in ("fp16", "fp32") for i in range(3)]
    assert [r.facts["merged_version"] for r in mine if r.unit.level == "fp16"] == [3, 4, 5]  # fp32 came first


def test_a_policy_that_shares_nothing_is_checkpointed_per_level(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, policies=(HERMIT,))
    run(config, tmp_path)
    for level in config.levels:
        state, _ = read_checkpoint(tmp_path / checkpoint_name(Key(HERMIT, 0, f"{level}.0")))
        assert float(state["total"]) == sum(r.tokens for r in read_units(tmp_path) if r.unit.level == level)


def test_a_run_that_was_cut_off_goes_on_without_counting_twice(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, levels=("fp32",))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    run(config, whole)
    events = run_local(job(config, cut))
    for _ in range(7):  # loading, ready, five units: in the middle of the second prompt
        next(events)
    events.close()
    assert len(read_units(cut)) == 5
    rest = [e for e in run_local(job(config, cut)) if e.kind == "unit"]
    assert len(rest) == 4

    outputs = {r.unit.key: r.facts["output"] for r in read_units(whole)}
    assert {r.unit.key: r.facts["output"] for r in read_units(cut)} == outputs
    assert not [e for e in run_local(job(config, cut)) if e.kind == "unit"]  # nothing is left to do


@pytest.mark.parametrize(("sharing", "scopes"), [("none", ["fp32.0", "fp16.0"]), ("per-level", ["fp32", "fp16"])])
def test_levels_learn_apart_if_asked(config: CompareConfig, tmp_path: Path, sharing: str, scopes: list[str]) -> None:
    run(replace(config, sharing=sharing, policies=(COUNTER,)), tmp_path, PROMPTS[:1])
    states = {f.name: float(read_checkpoint(f)[0]["total"]) for f in tmp_path.glob("policy-*.npz")}
    tokens = {r.unit.level: r.tokens for r in read_units(tmp_path)}
    assert states == {
        checkpoint_name(Key(COUNTER, 0, scope)): tokens[level]
        for scope, level in zip(scopes, config.levels, strict=True)
    }


def test_a_worker_pulls_every_so_many_steps(config: CompareConfig, tmp_path: Path) -> None:
    run(replace(config, sync_every=3, policies=(COUNTER, "fixed:2"), levels=("fp32",)), tmp_path)
    results = read_units(tmp_path)
    state, applied = read_checkpoint(tmp_path / checkpoint_name((COUNTER, 0)))
    assert float(state["total"]) == sum(r.tokens for r in results if r.unit.policy == COUNTER)
    version = 0
    for r in results:
        pulls = r.facts["pulls"]
        if r.unit.policy != COUNTER:
            assert pulls == []  # nothing is sent for a policy that does not learn
            continue
        ends = [*range(3, len(r.steps), 3), len(r.steps)]
        assert pulls == [[step, version + i + 1, 0] for i, step in enumerate(ends)]
        assert r.facts["merged_version"] == version
        version += len(ends)
    assert len(applied) == version


def test_the_lag_counts_what_others_sent_meanwhile(config: CompareConfig, tmp_path: Path) -> None:
    learner, units = Learner(tmp_path), blocks(config, PROMPTS, "fp32")
    a, b = (Worker(replace(config, policies=(COUNTER,)), "fp32", i, 1, PROMPTS, learner.sync) for i in (0, 1))
    a.load(), b.load()
    own = [(block.prompt, unit) for block in units for unit in block.units if unit.policy == COUNTER]
    for worker, (prompt, unit), start, lag in ((a, own[0], 0, 0), (b, own[1], 1, 0), (a, own[2], 1, 1)):
        facts = worker.decode(unit, prompt).facts
        assert (facts["merged_version"], facts["version_lag"]) == (start, lag)
    # A unit that is decoded again, as its worker died, teaches nothing more.
    before = learner.sync("", -1, {Key(COUNTER, 0): {}})[Key(COUNTER, 0)]
    again = b.decode(own[2][1], own[2][0])
    assert (again.facts["merged_version"], again.facts["version_lag"]) == (2, 0)
    assert learner.sync("", -1, {Key(COUNTER, 0): {}})[Key(COUNTER, 0)] == before


def test_a_queue_deals_every_unit_out_once(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, orders=2)
    found = blocks(config, PROMPTS, "fp32")
    writer = StepWriter(tmp_path / "steps-fp32.jsonl")
    writer.write(found[1].units[0], [STEP])
    work = Work(found, writer)
    assert (work.done, work.total, bool(work)) == (1, 18, True)
    first = work.take()
    work.give_back(list(first)[1:])  # its worker finished one and died
    taken = [first[0][0]]
    while units := work.take():
        taken += [unit for unit, _ in units]
    assert not work
    assert len(taken) == len({u.key for u in taken}) == 17
    assert found[1].units[0] not in taken


def test_a_level_that_fails_leaves_the_others_alone(config: CompareConfig, tmp_path: Path) -> None:
    prompts = [*PROMPTS, Prompt("epic", "chat", "x" * 600)]
    events = run(config, tmp_path, prompts)
    assert [e.kind for e in events] == ["loading", "failed"] * 2  # before anything is decoded
    assert all("prompt epic has 600 tokens" in e.text for e in events if e.kind == "failed")


def test_a_faulty_policy_is_counted(config: CompareConfig, tmp_path: Path) -> None:
    *_, last = run(replace(config, policies=(FAULTY,), levels=("fp32",)), tmp_path)
    assert last.facts is not None
    assert last.facts["faults"][f"{FAULTY} seed 0"] > 0
    assert {len(r.facts["output"]) for r in read_units(tmp_path)} <= set(range(1, 13))


def test_a_whole_run(
    config: CompareConfig,
    prompts_file: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, weights = tmp_path / "run", write_weights(tmp_path_factory.mktemp("weights") / "mlp16.npz")
    learned = f"mlp16:weights={weights}", f"online:weights={weights}"
    config = replace(config, policies=("autoregressive", "fixed:2", *learned))
    assert main(flags(config, "--prompts", prompts_file, "--out", out)) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(f"\nRun: {out}\nReport: {out}/report.html\n")
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
    said = manifest["workers"]["fp16"]["engine"]
    assert said.keys() == {"target", "draft"}
    assert manifest["config"]["engine"] in ENGINES
    assert all(status["on"] == (SUPPORTED and manifest["config"]["engine"] == "auto") for status in said.values())
    text = f"fp16: CPU engine: target {EngineStatus(**said['target'])}, draft {EngineStatus(**said['draft'])}."
    assert text in (out / "report.md").read_text()
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
    assert main(["--resume", str(out), "--json"]) == 0  # the same without saying it all again
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert read_manifest(out)["workers"] == manifest["workers"]


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
        if "unknown" in message:
            assert not out.exists(), "a misspelt name should leave no directory behind"
        for left in out.glob("*"):
            left.unlink()


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="no Ray cluster answers"), connect(f"127.0.0.1:{free_port()}"):
        pass


def test_a_ray_job_needs_an_absolute_output(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(flags(config, "--out", "runs/x")) == 2
    assert "absolute path" in capsys.readouterr().err


def test_a_manifest_says_where_its_figures_were_measured(
    config: CompareConfig, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    config = replace(config, levels=("fp32",), policies=("autoregressive",))
    assert main(flags(config, "--prompts", prompts_file, "--out", out)) == 0
    here, file = read_manifest(out), out / "run.json"
    elsewhere = {"started": "long ago", "hardware": {"processor": "another"}, "git": {"commit": "0ld"}}
    there = here | elsewhere | {"schedule": here["schedule"] | {"threads_per_worker": 7}}
    file.write_text(json.dumps(there))
    assert main(["--resume", str(out)]) == 0  # nothing is left to decode
    changing = {"finished"}
    assert {k: v for k, v in read_manifest(out).items() if k not in changing} == {
        k: v for k, v in there.items() if k not in changing
    }
    steps = out / "steps-fp32.jsonl"
    steps.write_bytes(steps.read_bytes()[:-10])
    capsys.readouterr()
    assert main(["--resume", str(out)]) == 0
    now = read_manifest(out)
    assert (now["hardware"], now["git"], now["schedule"]) == (here["hardware"], here["git"], here["schedule"])
    assert "between which this changed: hardware, git, schedule" in capsys.readouterr().out


def test_a_level_keeps_the_facts_of_all_its_workers(config: CompareConfig, tmp_path: Path) -> None:
    """Whichever is ready first."""
    ledger = RunManifest(RunDir.open(tmp_path / "run", {}), {}, Display(config, 1))
    for worker in (1, 0):
        ledger.note(Event("fp16", "ready", worker, facts={"device": f"gpu {worker}"}))
    ledger.note(Event("fp16", "finished", 1, facts={"finished": "now", "faults": {}}))
    entry = read_manifest(tmp_path / "run")["workers"]["fp16"]
    assert (entry["device"], entry["finished"], entry["others"]) == ("gpu 1", "now", {"0": {"device": "gpu 0"}})


def test_the_display_says_what_still_loads(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.runtime.display.EVERY", 0.02)
    shown = ""
    with Display(config, 1) as display:
        display.show(Event("int8", "waiting", 2))
        display.show(Event("fp32", "loading"))
        display.show(Event("fp16", "loading", 1))
        display.show(Event("fp32", "ready", facts={}))
        for _ in range(500):
            time.sleep(0.02)
            shown += capsys.readouterr().err
            if shown.count("fp16 worker 1 still loads (0 s)") > 1:
                break
        display.show(Event("fp16", "failed", 1, text="no room"))
        shown = shown.partition("ready")[2]
        capsys.readouterr()
        time.sleep(0.1)
    assert shown.count("fp16 worker 1 still loads (0 s)") > 1
    assert "fp32 worker 0 still loads" not in shown
    assert "int8 worker 2" not in shown  # it has no cores yet, and said so once
    assert "still loads" not in capsys.readouterr().err
