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

from experiments.learner import checkpoint_name, read_checkpoint
from policies.base import Context, Decision
from speckv_online.rundir import read_manifest, read_units
from tests.conftest import TinyPair
from tests.test_compare import Counter

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]


class Crasher(Counter):
    """Takes its whole process down in its fifth step, once: the marker says that it has happened."""

    def __init__(self, *, marker: str = "", seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        self.marker, self.decided = Path(marker), 0

    def decide(self, context: Context) -> Decision:
        self.decided += 1
        if self.decided == 5 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decide(context)


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)} | more


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


def test_a_local_ray_survives_the_death_of_a_worker(flags: list[str], tmp_path: Path) -> None:
    spec = f"tests.test_ray:Crasher:marker={tmp_path / 'crashed'}"
    command = [sys.executable, "-m", "experiments.compare", *flags, "--levels", "fp32", "--threads", "1"]
    command += ["--policies", f"autoregressive,{spec}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "crashed").exists()
    assert "fp32 6/6 " in done.stderr
    assert "Traceback" not in done.stderr

    results = read_units(tmp_path / "run")
    assert len({r.unit.key for r in results}) == len(results) == 6
    state, applied = read_checkpoint(tmp_path / "run" / checkpoint_name((spec, 0)))
    assert sorted(applied) == [("fp32", 0), ("fp32", 1), ("fp32", 2)]
    assert float(state["total"]) == sum(r.tokens for r in results if r.unit.policy == spec)
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "finished"
    assert manifest["workers"]["fp32"]["threads"] == 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """``ray start --head`` on the loopback interface, in a folder of its own; gives the environment of its clients."""
    folder, port = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port()  # sockets need a short path
    env = environment(RAY_TMPDIR=folder, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled")
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
    command += [f"--dashboard-port={port}", "--object-store-memory=100000000", "--disable-usage-stats"]
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
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=cluster, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp16 6/6 " in done.stdout  # progress
    assert f"Run: {tmp_path / 'run'}" in done.stdout
    assert len(read_units(tmp_path / "run")) == 12
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "finished"
    assert manifest["schedule"] == {
        "levels": "one after the other", "threads_per_worker": 1, "cores": 1, "actors": "ray",
    }  # fmt: skip
    spans = [(w["started"], w["finished"]) for w in manifest["workers"].values()]
    assert spans[0][1] <= spans[1][0]  # the cluster's one core was never shared
