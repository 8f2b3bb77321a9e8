"""Policies that end their process or never come back: they are named, cost their own units only, and others finish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.compare.__main__ import main
from experiments.runtime.call_watch import CallWatch, LateCall, PolicyCall, forget_note, note_path, read_note
from experiments.runtime.learner import checkpoint_name, read_checkpoint
from experiments.runtime.settings import CompareConfig
from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.runs import COUNTER, HARD, ROOT, environment, flags, make_config, write_prompts
from tests.support.tiny_models import TinyPair

PROMPTS = 3


@pytest.fixture
def config(tiny_pair: TinyPair, tmp_path: Path) -> CompareConfig:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    return make_config(tiny_pair, prompts=str(prompts), sync_every=3, call_seconds=1.0)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "experiments.compare", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)


def counts(run: Path, config: CompareConfig) -> dict[str, int]:
    """How many units of each policy a run holds."""
    units = [result.unit for result in read_units(run)]
    return {policy: sum(u.policy == policy for u in units) for policy in config.policies}


def check(run: Path, config: CompareConfig, hard: dict[str, str]) -> None:
    """All units of the other policies are there, with the right tokens, and the run names the hard ones."""
    every = len(config.levels) * PROMPTS
    found = counts(run, config)
    assert all(found[policy] < every if policy in hard else found[policy] == every for policy in config.policies), found
    outputs: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for result in read_units(run):
        outputs.setdefault((result.unit.level, result.unit.prompt), set()).add(tuple(result.facts["output"]))
    assert all(len(same) == 1 for same in outputs.values())
    manifest = read_manifest(run)
    assert manifest["status"] == "incomplete"
    assert manifest["failed"] == {}
    assert set(manifest["given_up"]) == set(hard)
    report = json.loads((run / "report.json").read_text())
    assert report["manifest"]["given_up"] == manifest["given_up"]
    for policy, said in hard.items():
        assert said in manifest["given_up"][policy]["reason"]
        assert manifest["given_up"][policy]["units"] == every - found[policy]
        line = f"Policy {policy} was given up: "
        assert line in (run / "report.md").read_text()
        assert any(note.startswith(line) for note in report["notes"])


@pytest.mark.parametrize("call", ["decide", "learn", "merge"])
def test_a_loop_ends_in_one_process(
    config: CompareConfig, tmp_path: Path, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hard = f"{HARD}:act=loop,call={call}"
    config = replace(config, policies=("fixed:2", hard, COUNTER, "autoregressive"))
    assert main(flags(config, "--out", tmp_path / "run")) == 1
    check(tmp_path / "run", config, {hard: f"{call} did not come back within 1 s (prompt p"})
    shown = capsys.readouterr()
    assert f"policy {hard} was given up: {call} did not come back" in shown.err
    assert "Traceback" not in shown.err


def test_what_is_no_exception_costs_the_policy_only(config: CompareConfig, tmp_path: Path) -> None:
    hard = f"{HARD}:act=panic"
    config = replace(config, policies=("fixed:2", hard, COUNTER))
    assert main(flags(config, "--out", tmp_path / "run")) == 1
    check(tmp_path / "run", config, {hard: "raised Panic: on purpose"})


def test_what_fails_in_the_learner_costs_the_policy_only(config: CompareConfig, tmp_path: Path) -> None:
    hard = f"{HARD}:act=raise,call=merge,after=1"
    config = replace(config, policies=("fixed:2", hard, COUNTER))
    assert main(flags(config, "--out", tmp_path / "run")) == 1
    check(tmp_path / "run", config, {hard: "merge raised ValueError in the learner: on purpose"})
    state, batches = read_checkpoint(tmp_path / "run" / checkpoint_name((hard, 0)))
    assert (len(batches), float(state["total"]) > 0) == (1, True)  # what was merged before stays


def test_a_policy_alone_leaves_nothing_to_report(
    config: CompareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, policies=(f"{HARD}:act=panic,after=0",), levels=("fp32",))
    assert main(flags(config, "--out", tmp_path / "run")) == 2
    assert "error: policy tests.support.runs:Hard:act=panic,after=0 was given up: " in capsys.readouterr().err


@pytest.mark.parametrize(("act", "code"), [("exit", 7), ("deaf", 2)])
def test_a_resume_names_who_ended_the_process(
    config: CompareConfig, tmp_path: Path, act: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray nothing is left after that; what was recorded stays, and the others go on."""
    hard, run = f"{HARD}:act={act},after=8", tmp_path / "run"
    config = replace(config, policies=("fixed:2", hard, COUNTER))
    done = command(*flags(config, "--out", run))
    assert done.returncode == code, done.stderr
    before = {r.unit.key for r in read_units(run)}
    assert 0 < len(before) < 3 * 2 * PROMPTS
    what = {"exit": "decide ended its process", "deaf": "decide did not come back within 1 s"}[act]
    if act == "exit":  # it may have been somebody else, so it is tried once more
        done = command("--resume", str(run))
        assert done.returncode == code, done.stderr
        said = f"policy {hard}: {what} (prompt p"
        assert [said in line and "tried once more" in line for line in done.stderr.splitlines()].count(True) == 1
    assert main(["--resume", str(run)]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert sum(f"policy {hard} was given up: {what}" in line for line in shown) == 1
    assert sum("its units are left out this time" in line for line in shown) == 1
    check(run, config, {hard: what})
    assert before <= {r.unit.key for r in read_units(run)}
    if act == "deaf":
        assert command("--resume", str(run)).returncode == code  # the one after that tries it again


@pytest.mark.parametrize("ends", [["fixed:2"], ["fixed:2", "autoregressive"], ["fixed:2", "autoregressive", "fixed:2"]])
def test_whoever_was_killed_once_goes_on(
    config: CompareConfig, tmp_path: Path, ends: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that is killed within a policy's call looks as if the policy had ended it."""
    run = tmp_path / "run"
    config = replace(config, policies=("fixed:2", "autoregressive"), levels=("fp32",))
    assert main(flags(config, "--out", run)) == 0
    for policy in ends:
        watch = CallWatch(note_path(run), 60, outlived=True)
        watch.about(policy, "prompt p0 at fp32")
        watch.enter("decide")
    assert main(["--resume", str(run)]) == 0
    assert "it is tried once more" in capsys.readouterr().err
    assert read_note(note_path(run)) is None


def test_a_note_of_a_run_that_was_removed_says_nothing(config: CompareConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watch = CallWatch(note_path(run), 60)
    watch.about("fixed:2", "prompt p0 at fp32")
    watch.enter("decide")
    assert read_note(note_path(run)) == PolicyCall("fixed:2", "prompt p0 at fp32", "decide", 1)
    config = replace(config, policies=("fixed:2",), levels=("fp32",))
    assert main(flags(config, "--out", run)) == 0
    assert read_note(note_path(run)) is None


def never_ends(watch: CallWatch) -> None:
    with watch.calling("decide"):
        while True:
            pass


def test_a_late_call_is_interrupted_and_others_are_not() -> None:
    path = note_path("a test", os.getpid())
    with CallWatch(path, 0.2) as watch:
        for _ in range(2000):
            with watch.calling("learn"):
                pass
        assert read_note(path) is None
        with pytest.raises(LateCall):
            never_ends(watch)
        assert read_note(path) is None
    assert not path.exists()


def test_a_note_outlives_its_process() -> None:
    path = note_path("another test", os.getpid())
    for _ in range(2):
        child = os.fork()
        if not child:
            watch = CallWatch(path, 60, outlived=True)
            watch.about("x:a=1", "here")
            watch.enter("merge")
            os._exit(0)
        os.waitpid(child, 0)
    assert [(call.policy, call.name, call.late) for call in CallWatch(path, 60, outlived=True).ended] == [
        ("x:a=1", "merge", False)
    ] * 2
    path.write_bytes(b"\x03" + os.urandom(3000))
    assert read_note(path) is None
    assert CallWatch(path, 60, outlived=True).ended == []
    forget_note(path)


@pytest.mark.ray
def test_on_ray_the_other_policies_finish(config: CompareConfig, tmp_path: Path) -> None:
    """All kinds in one run: its workers and its learner are ended by each of them in turn."""
    expected = {
        f"{HARD}:act=exit,call=decide": "decide ended its process (prompt p",
        f"{HARD}:act=exit,call=merge": "merge ended its process (in the learner)",
        f"{HARD}:act=loop,call=learn": "learn did not come back within 2 s (prompt p",
        f"{HARD}:act=deaf,call=merge": "merge did not come back within 2 s (in the learner)",
        f"{HARD}:act=native,call=decide": "decide did not come back within 2 s (prompt p",
    }
    run, policies = tmp_path / "run", ("fixed:2", *expected, COUNTER)
    config = replace(config, policies=policies, levels=("fp32",), local=False, call_seconds=2.0, workers=2)
    done = command(*flags(config, "--out", run))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    check(run, config, expected)
    assert 1 <= done.stderr.count("it is tried once more") <= 2  # each of the two workers may have had a unit of it
    assert "lack of memory" not in done.stderr
