"""Kills on a real Ray: workers, the learner, the job, a machine of a cluster; nothing is lost or counted twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import main
from experiments.config import CompareConfig
from experiments.learner import checkpoint_name, read_checkpoint
from speckv_online.prompts import Prompt
from speckv_online.rundir import read_manifest, read_units
from tests.compare_env import COUNTER, ROOT, environment, flags, free_port, make_config, write_prompts
from tests.conftest import TinyPair

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


def start(config: CompareConfig, out: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.compare", *flags(config, "--out", out)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**env), start_new_session=True,
    )  # fmt: skip


def actors(job: int, kind: str) -> list[int]:
    """Process ids of the actors of a class that descend from a process."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue  # it has just ended
    found = []
    for pid, title in titles.items():
        if title.startswith(f"ray::{kind}"):
            above = pid
            while above in parents and above != job:
                above = parents[above]
            found += [pid] if above == job else []
    return found


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
    moments = [*sorted(rng.sample(range(1, UNITS - 4), len(victims))), UNITS - 3]  # units done by then
    job = start(config, run)
    assert job.stderr is not None
    killed, shown = [], []
    for line in job.stderr:
        shown.append(line)
        if moments and f" {moments[0]}/{UNITS} " in line:
            moments.pop(0)
            time.sleep(rng.uniform(0.0, 0.1))
            if not victims:
                os.kill(job.pid, signal.SIGKILL)
                killed.append("Job")
                continue
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
        assert job.wait(60) == 0, shown
        assert second is None
    finally:
        cluster.shutdown()
    check(run, config)
