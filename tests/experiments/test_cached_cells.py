"""Cells of an experiment on traces: what they depend on, and how a run is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.common.cached_cells import contents
from experiments.common.documents import check_place, insert
from speckv_online.simulate.cost_table import RTX3090_RELEASE, load_cost
from speckv_online.traces.trace import load_traces
from tests.support.random_traces import random_traces, save

SLOW = """
import sys, time
from pathlib import Path
from experiments.common.cached_cells import run
from speckv_online.console import run_command

def play(cell):
    if cell[0] == "slow":
        Path(cell[1]).touch()
        time.sleep(600)
    return 1

if __name__ == "__main__":
    folder = sys.argv[1]
    cells = [("slow", f"{folder}/started"), ("quick", "1")]
    sys.exit(run_command("test", lambda: run(cells, play, Path(folder) / "log", processes=2) and 0))
"""


def test_an_interrupt_ends_all_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(tmp_path)]
    told = {"cwd": Path(__file__).parents[2], "env": os.environ | {"PYTHONPATH": "."}}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **told) as run:  # type: ignore[call-overload]
        log = tmp_path / "log"
        while not ((tmp_path / "started").exists() and log.exists() and "quick" in log.read_text()):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("test: interrupted\n")


def test_contents_are_what_files_hold(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(random_traces(2), tmp_path / "a")
    (tmp_path / "cost.json").write_text("1")
    named = [str(tmp_path / "a"), str(tmp_path / "cost.json"), "rtx3090-release"]
    first = contents(named)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [str(tmp_path / "b"), *named[1:]]
    assert contents(moved) == first
    (tmp_path / "cost.json").write_text("2")
    assert contents(moved) != first
    (tmp_path / "cost.json").write_text("1")
    assert contents([*moved[:2], "other"]) != first
    again = tmp_path / "again"
    assert contents([str(save(random_traces(2), again)), *moved[1:]]) == first
    assert contents([str(save(random_traces(2, ease=3), again)), *moved[1:]]) != first
    next(again.rglob("*.npz")).write_bytes(b"damaged")
    assert contents([str(again), *moved[1:]]) != first


def test_a_tilde_is_the_home_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands it only at the start of a word, not behind `default=`, and YAML never."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(random_traces(2), tmp_path / "traces")
    assert [t.prompt_id for t in load_traces("~/traces")] == [t.prompt_id for t in load_traces(tmp_path / "traces")]
    RTX3090_RELEASE.save(tmp_path / "cost.json")
    assert load_cost("~/cost.json") == RTX3090_RELEASE
    (tmp_path / "a.md").write_text("<!-- x: begin -->\n<!-- x: end -->\n")
    check_place("~/a.md", "x")
    insert(Path("~/a.md"), "table", "x")
    assert "table" in (tmp_path / "a.md").read_text()
