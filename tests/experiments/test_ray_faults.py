"""Kills on a real Ray: workers, the learner, the job, a machine of a cluster; nothing is lost or counted twice."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.compare.__main__ import main
from experiments.runtime.learner import checkpoint_name, read_checkpoint
from experiments.runtime.settings import CompareConfig
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.kills import actors, kill, kill_runs, start
from tests.support.runs import COUNTER, PATIENT, environment, flags, free_port, make_config, write_prompts
from tests.support.tiny_models import TinyPair

pytestmark = pytest.mark.ray
UNITS = 24


@pytest.fixture
def config(tiny_pair: TinyPair, tmp_path: Path) -> CompareConfig:
    prompts = [Prompt(f"p{i}", "chat", f"hello {i}") for i in range(UNITS // 2)]
    file = write_prompts(tmp_path / "prompts.jsonl", prompts)
    return make_config(
        tiny_pair, levels=("fp32",), policies=("fixed:3", COUNTER), prompts=str(file), workers=2, sync_every=3,
        local=False,
    )  # fmt: skip


def check(run: Path, config: CompareConfig) -> None:
    """The run has every unit once, with the outputs of an undisturbed one, and learnt from each step once."""
    whole = run.with_name("whole")
    if not whole.exists():
        assert main(flags(replace(config, local=True), "--out", whole)) == 0
    results, expected = read_units(run), read_units(whole)
    lines = [line for file in run.glob("steps-*.jsonl") for line in file.read_text().splitlines()]
    assert sum('"done":' in line for line in lines) == len(results) == UNITS
    assert {r.unit.key: r.facts["output"] for r in results} == {r.unit.key: r.facts["output"] for r in expected}
    state, batches = read_checkpoint(run / checkpoint_name((COUNTER, 0)))
    reference, names = read_checkpoint(whole / checkpoint_name((COUNTER, 0)))
    assert (
        float(state["total"]) == float(reference["total"]) == sum(r.tokens for r in results if r.unit.policy == COUNTER)
    )
    assert sorted(batches) == sorted(names)
    assert read_manifest(run)["status"] == "finished"


def test_workers_the_learner_and_the_job_are_killed(config: CompareConfig, tmp_path: Path) -> None:
    """Four SIGKILLs of workers, two of the learner and one of the whole job, at seeded random moments."""
    rng, run = random.Random(0), tmp_path / "run"
    victims = ["Worker"] * 4 + ["Learner"] * 2
    rng.shuffle(victims)
    # Units done by then; the job goes with a third of them left, since they go on while it is being killed.
    moments = [*sorted(rng.sample(range(1, UNITS - 9), len(victims))), UNITS - 8]
    job = start(config, run)
    assert job.stderr is not None
    killed, shown = [], []
    for line in job.stderr:
        shown.append(line)
        if moments and f" {moments[0]}/{UNITS} " in line:
            moments.pop(0)
            if not victims:
                os.kill(job.pid, signal.SIGKILL)
                killed.append("Job")
                continue
            time.sleep(rng.uniform(0.0, 0.1))
            pids: list[int] = []
            while not pids:
                pids = actors(job.pid, victims[0])
                assert job.poll() is None, shown
            os.kill(rng.choice(pids), signal.SIGKILL)
            killed.append(victims.pop(0))
    assert job.wait(60) == -signal.SIGKILL, shown
    assert sorted(killed) == ["Job", "Learner", "Learner", *["Worker"] * 4]
    assert 0 < len(read_units(run)) < UNITS
    assert not any("Traceback" in line for line in shown)
    assert main(["--resume", str(run), "--local"]) == 0
    check(run, config)


def test_a_victim_that_has_just_ended_is_no_kill() -> None:
    with subprocess.Popen(["sleep", "60"]) as job:
        assert kill(job.pid)
    assert job.returncode == -signal.SIGKILL
    assert not kill(job.pid)


@pytest.mark.slow
def test_kills_in_the_middle_of_units(tmp_path: Path) -> None:
    """Every unit once, and what was learnt as if undisturbed; `python -m tests.support.kills` does it 50 times."""
    found = kill_runs(tmp_path, kills=4, seed=1, prompts=8, tokens=24)
    assert sum(found["kills"].values()) == 4


def test_levels_that_fail_leave_the_others_alone(config: CompareConfig, tmp_path: Path) -> None:
    """One cannot be loaded; one meets a full disk in the records, one in the learner's checkpoints; one is well.

    The system refuses larger files to the process at hand while such a level runs: on one core, they run one by one.
    """
    run, bad, core = tmp_path / "run", "gptq:bits=5", {min(os.sched_getaffinity(0))}
    config = replace(config, levels=("fp32", bad, "bf16", "fp16"), policies=("autoregressive", COUNTER), workers=1)
    job = start(config, run, core)
    assert job.stderr is not None
    shown = []
    for line in job.stderr:
        shown.append(line)
        for level, size in (("fp32", 9000), ("bf16", 64)):
            if f"] {level} ready: " in line or f"] {level} failed: " in line:
                (full,) = [job.pid] if level == "fp32" else actors(job.pid, "Learner")
                limit = size if "ready" in line else resource.RLIM_INFINITY
                resource.prlimit(full, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    text = "".join(shown)
    assert job.wait(60) == 1, text
    assert "Traceback" not in text
    failed = read_manifest(run)["failed"]
    assert set(failed) == {"fp32", bad, "bf16"}, text
    assert failed["fp32"].startswith("cannot write steps-fp32.jsonl: ")
    assert failed["bf16"].startswith("cannot write policy-"), failed
    assert "does not take 'bits=5'" in failed[bad]
    report = (run / "report.md").read_text()
    assert all(f"Not everything was decoded at {level}: " in report for level in failed)
    counts = {level: sum(r.unit.level == level for r in read_units(run)) for level in config.levels}
    assert counts["fp16"] == UNITS
    assert counts[bad] == 0
    assert 0 < counts["fp32"] < UNITS
    assert counts["bf16"] < UNITS


def machine() -> dict[str, Any]:
    """Settings of a machine of one core; given its ports, Ray does not wait for them, and a busy machine is slow."""
    agents = "metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent"
    ports = {f"{name}_port": free_port() for name in agents}
    return {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000, **ports}


def test_a_cluster_loses_a_machine(config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    for name, value in environment(**ray).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    # Units wait until both workers are ready: a quick one would end the run before the other has started.
    gate = tmp_path / "gate"
    config = replace(config, policies=(f"{PATIENT}:file={gate}", COUNTER))
    cluster = Cluster(initialize_head=True, head_node_args={**machine(), "include_dashboard": False})
    try:
        second = cluster.add_node(**machine())
        run = tmp_path / "run"
        job = start(config, run, RAY_ADDRESS=cluster.address, **ray)
        assert job.stderr is not None
        shown, ready = [], 0
        for line in job.stderr:
            shown.append(line)
            ready += " ready: " in line
            if ready == 2 and second is not None:
                cluster.remove_node(second, allow_graceful=False)
                second = None
                gate.touch()
        assert job.wait(60) == 0, shown
        assert second is None
    finally:
        cluster.shutdown()
    check(run, config)
