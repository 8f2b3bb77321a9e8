"""A disk that is full in the middle of a run: a small file system, mounted in a name space of the test's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.runtime.settings import CompareConfig
from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.runs import COUNTER, ROOT, environment, flags, make_config, write_prompts
from tests.support.tiny_models import TinyPair

#: A run needs 50 MB of free disk to begin with.
MOUNT = "mount -t tmpfs -o size=64m tmpfs"
SCRIPT = f"""
set -eu
disk=$1; kept=$2; shift 2
{MOUNT} "$disk"
run() {{ code=0; "$@" >> "$kept/log" 2>&1 || code=$?; echo $code; }}
run "$@"
cp -r "$disk/run" "$kept/full"
run "$1" -m experiments.compare --resume "$disk/run"
rm "$disk/ballast"
run "$1" -m experiments.compare --resume "$disk/run"
cp -r "$disk/run" "$kept/after"
"""


@pytest.fixture
def config(tiny_pair: TinyPair, tmp_path: Path) -> CompareConfig:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    return make_config(tiny_pair, levels=("fp32",), prompts=str(prompts), sync_every=3)


def in_a_small_disk(folder: Path, config: CompareConfig) -> tuple[list[int], list[str]]:
    """Run a comparison there, resume it, free the disk and resume it; return the exit codes and what was shown."""
    disk, kept = folder / "disk", folder / "kept"
    disk.mkdir(exist_ok=True)
    kept.mkdir()
    line = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        SCRIPT,
        "sh",
        str(disk),
        str(kept),
        sys.executable,
        "-m",
        "experiments.compare",
    ]
    line += flags(config, "--out", disk / "run")
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600)
    log = (kept / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "Traceback" not in log
    return [int(code) for code in done.stdout.split()], log.splitlines()


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-Urm", "sh", "-c", f"{MOUNT} /mnt"], capture_output=True).returncode != 0,
    reason="no file system can be mounted here",
)
@pytest.mark.parametrize("position", [0, 2])
def test_a_run_goes_on_after_there_is_room_again(config: CompareConfig, tmp_path: Path, position: int) -> None:
    """The disk fills up within the unit of a policy; its checkpoint, the records or the manifest cannot be written."""
    policies = ["fixed:2", COUNTER, "autoregressive"]
    policies[position:position] = [f"tests.support.runs:Filler:file={tmp_path / 'disk' / 'ballast'}"]
    config = replace(config, policies=tuple(policies))
    codes, log = in_a_small_disk(tmp_path, config)
    assert codes in ([1, 2, 0], [2, 2, 0]), log  # 2 where nothing had been recorded
    full, after = tmp_path / "kept" / "full", tmp_path / "kept" / "after"
    before = {r.unit.key: r.facts["output"] for r in read_units(full)} if codes[0] == 1 else {}
    assert len(before) < 12
    # Whatever lies there is whole: no half-written record or file.
    for file in full.glob("steps-*.jsonl"):
        assert file.read_bytes()[-1:] in (b"\n", b"")
    assert not list(full.glob(".*.part"))
    assert read_manifest(full)["status"] != "finished"
    end = next(
        i for i, line in enumerate(log) if "No space left on device" in line and "error: cannot write to" in line
    )
    said = [line for line in log[:end] if "No space left on device" in line]
    assert sum("fp32 failed: cannot write" in line for line in said) == 1
    assert sum("run.json" in line for line in said) <= 1
    results = {r.unit.key: r.facts["output"] for r in read_units(after)}
    assert len(results) == 12
    assert before.items() <= results.items()
    assert read_manifest(after)["status"] == "finished"
    assert (after / "report.html").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_is_shown_goes_to_a_full_disk(config: CompareConfig, tmp_path: Path, stream: str) -> None:
    """The run is not ended by it; an answer that cannot be given is an error."""
    config = replace(config, policies=("fixed:2",))
    line = [sys.executable, "-m", "experiments.compare", *flags(config, "--out", tmp_path / "run")]
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: full}
        done = subprocess.run(line, text=True, cwd=ROOT, env=environment(), timeout=300, check=False, **streams)
    assert read_manifest(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run" / "report.html").exists()
    if stream == "stderr":
        assert done.returncode == 0
        assert "Report: " in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "compare: error: No space left on device"
