"""Cells of an experiment on traces: what they depend on, and how a run is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grimp
import pytest

from experiments.common.cached_cells import contents, run
from experiments.common.code_digest import PACKAGES, ROOT, digest, sources
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
    sys.exit(run_command("test", lambda: run(cells, play, Path(folder) / "log", code=[], processes=2) and 0))
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


#: Modules that play the cells of experiments.adaptation and experiments.streams.
PLAYERS = ("experiments.streams.cells", "experiments.adaptation.replay")


@pytest.mark.parametrize("player", PLAYERS)
def test_the_sources_of_a_replay_are_those_of_the_import_graph(player: str) -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    names = [".".join(file.with_suffix("").parts) for file in sources([player])]
    modules = {name for name in names if not name.endswith("__init__")}
    assert modules == {m for m in {player, *graph.find_upstream_modules(player)} if not graph.find_children(m)}
    assert "speckv_online.simulate.simulator" in modules


@pytest.mark.parametrize("player", PLAYERS)
def test_the_digest_is_of_all_that_bears_on_a_replay(player: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=lambda folder, names: [
            name for name in names if name.endswith((".safetensors", ".pyc", ".jsonl"))])  # fmt: skip
    first = digest([player], root=tmp_path)
    assert first == digest([player])
    assert digest([player], "other settings", root=tmp_path) != first
    for name, counts in {
        "speckv_online/simulate/simulator.py": True,
        "speckv_online/traces/trace.py": True,
        "speckv_online/lookup/ngram_index.py": True,
        "speckv_online/context.py": True,
        "experiments/streams/merge.py": player != "experiments.adaptation.replay",
        "policies/learned/online.py": True,
        "policies/data/online.npz": True,
        "policies/data/mlp16.json": True,
        "speckv_online/data/gate-smollm2.npz": True,
        "speckv_online/reporting/html_page.py": False,
        "experiments/streams/plots.py": False,
    }.items():
        held = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(held + b"\n")
        assert (digest([player], root=tmp_path) != first) == counts, name
        (tmp_path / name).write_bytes(held)
    assert digest([player], root=tmp_path) == first


def test_the_digest_is_of_policies_of_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policy.py").write_text("from policies.fixed import Fixed\n\n\nclass Own(Fixed):\n    pass\n")
    (tmp_path / "weights").write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    specs = ["own_policy:Own", f"online:acceptance={tmp_path / 'weights'}"]
    found = [digest([], policies=specs)]
    for name in ("own_policy.py", "weights"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        found.append(digest([], policies=specs))
    assert len(set(found)) == 3
    assert digest([], policies=["fixed:4"]) == digest([])


def test_cells_of_other_settings_are_played_again(tmp_path: Path) -> None:
    played: list[tuple[str, ...]] = []

    def play(cell: tuple[str, ...]) -> int:
        played.append(cell)
        return len(played)

    for settings, count in (("a", 1), ("a", 1), ("b", 2)):
        assert run([("x",)], play, tmp_path / "log", code=list(PLAYERS), settings=settings) == {("x",): count}


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
