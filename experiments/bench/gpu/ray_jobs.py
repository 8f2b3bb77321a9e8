"""A comparison as a submitted Ray job: a worker per level on a third of the GPU each; it is killed once and goes on.

Ray is started on the loopback interface, in a folder of its own, and ended again. Only processes that were started here
are killed: the job's driver is known by the run directory in its command line.
"""

from __future__ import annotations

import importlib.util
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.gpu.models import FAMILIES, save_family
from experiments.bench.gpu.settings import Skip, Stage
from speckv_online.errors import UserError
from speckv_online.io.manifest import cores
from speckv_online.io.run_directory import read_manifest, read_units

LEVELS = ("fp16", "int8", "nf4")
POLICIES = ("autoregressive", "fixed:4", "online")
ROOT = Path(__file__).parents[3]


@dataclass
class Head:
    """A Ray of this stage: its environment, its command, and what it says."""

    env: dict[str, str]
    command: str
    log: Path


def run(stage: Stage) -> None:
    """Run the job."""
    found = stage.attempt("a submitted job, killed once and resumed", lambda: job(stage))
    if found is not None:
        stage.found |= found
        stage.save()


def job(stage: Stage) -> dict[str, Any]:
    """Submit, kill, submit again; return what the run directory says."""
    if importlib.util.find_spec("ray") is None:
        raise Skip("Ray is not installed")
    levels = [x for x in LEVELS if x == "fp16" or importlib.util.find_spec("bitsandbytes") is not None]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:  # sockets need a short path
        folder = Path(name)
        settings = write_settings(stage, levels, folder)
        run_dir, units = folder / "run", len(levels) * len(POLICIES) * settings["prompts"]
        with head(stage, folder) as ray:
            started = time.monotonic()
            first = submit(ray, folder)
            try:
                before = wait_for_units(stage, run_dir, units // 4, first)
                killed = kill_driver(run_dir)
                first.wait(timeout=max(stage.left(), 1))
            finally:
                end(first)
            again = submit(ray, folder)
            try:
                code = again.wait(timeout=max(stage.left(), 1))
            except subprocess.TimeoutExpired:
                raise Skip(f"the job had {len(done(run_dir))} of {units} units when time was up") from None
            finally:
                end(again)
            seconds = time.monotonic() - started
        return describe(run_dir, units) | {
            "levels": levels, "gpus_each": settings["gpus"], "killed_drivers": killed, "units_before_the_kill": before,
            "exit_code": code, "seconds": seconds,
        }  # fmt: skip


def write_settings(stage: Stage, levels: list[str], folder: Path) -> dict[str, Any]:
    """Write the comparison's YAML; return what the caller needs of it."""
    gpus = 0.0 if stage.device.type == "cpu" else round(1 / len(LEVELS), 2)
    threads = max(1, cores() // (2 * len(levels)))
    prompts = 2 if stage.tiny else 8
    settings: dict[str, Any] = {
        "levels": levels, "policies": list(POLICIES), "prompts": prompts, "max_new_tokens": 8 if stage.tiny else 64,
        "device": stage.device.type, "out": str(folder / "run"), "sync_every": 8,
        "resources": {"default": {"workers": 1, "gpus": gpus, "threads": threads}},
    }  # fmt: skip
    if stage.tiny:
        target, draft = save_family(FAMILIES[0], folder)
        settings |= {"target": str(target), "draft": str(draft)}
    (folder / "job.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return {"prompts": prompts, "gpus": gpus}


@contextmanager
def head(stage: Stage, folder: Path) -> Iterator[Head]:
    """Start Ray, and end it; raises :class:`Skip` where it does not come up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "RAY_TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "150", "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    found = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise Skip("the command ray is not there")
    command = [found, "start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={max(cores(), len(LEVELS))}", f"--dashboard-port={port}", "--disable-usage-stats"]
    command += ["--object-store-memory=100000000"] + (["--num-gpus=1"] if stage.device.type == "cuda" else [])
    log = folder / "head.log"
    own = {key: value for key, value in env.items() if key != "RAY_ADDRESS"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own, start_new_session=True)
    try:
        while not answers(port):
            if process.poll() is not None or stage.left() <= 0:
                raise Skip(f"Ray did not start: {log.read_text()[-200:]}")
            time.sleep(0.3)
        yield Head(env, found, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # to be thrown away: an orderly end takes half a minute
        process.wait(timeout=60)


def answers(port: int) -> bool:
    """Return True if something listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def submit(ray: Head, folder: Path) -> subprocess.Popen[bytes]:
    """Submit the comparison and follow it."""
    command = [ray.command, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, "-m"]
    command += ["experiments.compare", "--config", str(folder / "job.yaml")]
    with ray.log.open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ray.env, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def done(run_dir: Path) -> list[Any]:
    """Return the units that are finished so far."""
    try:
        return read_units(run_dir)
    except (UserError, OSError):
        return []


def wait_for_units(stage: Stage, run_dir: Path, count: int, process: subprocess.Popen[bytes]) -> int:
    """Wait until so many units are finished; return how many are."""
    while len(done(run_dir)) < max(count, 1):
        if process.poll() is not None:
            raise Skip("the job ended before it could be killed: see its log by `ray job submit` by hand")
        if stage.left() <= 0:
            raise Skip("no unit was finished when time was up")
        time.sleep(0.2)
    return len(done(run_dir))


def kill_driver(run_dir: Path) -> int:
    """Kill the job's driver with SIGKILL; return how many processes that were."""
    killed = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has just ended
        mine = "experiments.compare" in words and str(run_dir.parent / "job.yaml") in words
        if mine and "submit" not in words:
            os.kill(int(entry.name), signal.SIGKILL)
            killed += 1
    return killed


def describe(run_dir: Path, units: int) -> dict[str, Any]:
    """Return what the run directory holds: every unit once, and the same output whatever the policy."""
    results = done(run_dir)
    lines = [line for file in run_dir.glob("steps-*.jsonl") for line in file.read_text().splitlines()]
    outputs: dict[tuple[str, str], set[str]] = {}
    for r in results:
        outputs.setdefault((r.unit.level, r.unit.prompt), set()).add(json.dumps(r.facts["output"]))
    manifest = read_manifest(run_dir) if results else {}
    return {
        "units": len(results), "units_expected": units, "finished_lines": sum('"done":' in line for line in lines),
        "prompts_with_several_outputs": sum(len(found) > 1 for found in outputs.values()),
        "status": manifest.get("status"), "failed_levels": manifest.get("failed"),
        "tokens_per_second_by_level": {
            level: sum(r.tokens for r in own) / max(sum(r.seconds for r in own), 1e-9)
            for level in LEVELS
            if (own := [r for r in results if r.unit.level == level])
        },
    }  # fmt: skip
