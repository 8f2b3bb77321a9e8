"""The comparison on a real Ray: started by the run itself, and as a submitted job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.runs import ROOT, environment, free_port
from tests.support.tiny_models import TinyPair

pytestmark = pytest.mark.ray


@pytest.fixture
def flags(tiny_pair: TinyPair, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": f"p{i}", "task": "chat", "prompt": f"hello {i}"}) + "\n" for i in range(3))
    )
    values: dict[str, Any] = {
        "target": tiny_pair.target_dir, "draft": tiny_pair.draft_dir, "prompts": prompts, "max-new-tokens": 12,
        "device": "cpu", "out": tmp_path / "run",
    }  # fmt: skip
    return [x for key, value in values.items() for x in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """``ray start --head`` on the loopback interface, in a folder of its own; gives the environment of its clients."""
    folder, port = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port()  # sockets need a short path
    env = environment(RAY_TMPDIR=folder, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled")
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
    command += [f"--dashboard-port={port}", "--object-store-memory=100000000", "--disable-usage-stats"]
    # Ports of its own: jobs are never taken where another Ray of the machine has the agent's usual one.
    agents = "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export"
    command += [f"--{agent}-port={free_port()}" for agent in agents]
    with open(Path(folder) / "head.log", "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert head.poll() is None, (Path(folder) / "head.log").read_text()
                assert time.monotonic() < deadline, "Ray did not start"
                time.sleep(0.3)
        yield env | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY": ray}
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # a cluster to throw away: an orderly end takes half a minute
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job(cluster: dict[str, str], flags: list[str], tmp_path: Path) -> None:
    command = [cluster["RAY"], "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", "experiments.compare"]
    command += [*flags, "--levels", "fp32,fp16", "--policies", "autoregressive,fixed:2"]
    for _ in range(60):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=cluster, timeout=300)
        if "No available agent" not in done.stdout + done.stderr:  # Ray's job server answers before its agent is up
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp16 6/6 " in done.stdout  # progress
    said = [done.stdout.index(f"fp16 worker 0 {what}") for what in ("waits for free cores", "loads")]
    assert said[0] < done.stdout.index("fp32 worker 0 finished") < said[1]
    assert f"Run: {tmp_path / 'run'}" in done.stdout
    assert len(read_units(tmp_path / "run")) == 12
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "finished"
    share = {"workers": 1, "threads": 1, "gpus": 0.0}
    assert manifest["schedule"] == {
        "levels": "one after the other", "threads_per_worker": 1, "cores": 1, "actors": "ray",
        "shares": {"fp32": share, "fp16": share},
    }  # fmt: skip
    spans = [(w["started"], w["finished"]) for w in manifest["workers"].values()]
    assert spans[0][1] <= spans[1][0]  # the cluster's one core was never shared


def test_speckv_submit(cluster: dict[str, str], flags: list[str], tmp_path: Path) -> None:
    settings = {
        key.removeprefix("--").replace("-", "_"): value for key, value in zip(flags[::2], flags[1::2], strict=True)
    }
    settings |= {"max_new_tokens": 12, "levels": ["fp32"], "policies": ["autoregressive", "fixed:2"]}
    (tmp_path / "small.yaml").write_text(json.dumps(settings))  # JSON is YAML
    back = tmp_path / "back"
    command = [sys.executable, "-m", "speckv_online.cli", "submit", str(tmp_path / "small.yaml")]
    command += ["--python", sys.executable, "--out", str(back), "--set", "sync_every=5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=cluster, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp32 6/6 " in done.stdout
    assert "files came back" in done.stderr
    for name in ("run.json", "config.yaml", "steps-fp32.jsonl", "report.html", "plots/goodput.png"):
        assert (back / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert "sync_every: 5" in (back / "config.yaml").read_text()

    command += ["--set", "policies=fixd", "--remote-out", str(tmp_path / "other"), "--no-fetch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=cluster, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr  # the exit code of the job's own command
    assert "unknown policy 'fixd'" in done.stdout
    assert "ended with status FAILED" in done.stderr
