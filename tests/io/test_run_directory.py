"""Run directories: append-only records that survive a kill, atomic checkpoints, refusals."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.runtime.learner import read_checkpoint
from speckv_online.errors import UserError
from speckv_online.io.run_directory import RunDir, StepWriter, load_arrays, read_manifest, read_units, save_arrays
from speckv_online.io.step_records import SCHEMA_VERSION
from tests.support.records import steps, unit


def test_units_come_back_as_they_were_written(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path / "steps-nf4.jsonl")
    writer.write(unit(), steps(3), {"output": [1, 2, 3], "prefill_seconds": 0.5})
    writer.write(unit("p2"), steps(2))
    writer.close()
    first, second = read_units(tmp_path)
    assert (first.unit, first.steps, first.facts) == (unit(), steps(3), {"output": [1, 2, 3], "prefill_seconds": 0.5})
    assert (second.tokens, second.seconds) == (6, pytest.approx(0.142))
    header = json.loads((tmp_path / "steps-nf4.jsonl").read_text().splitlines()[0])
    assert header == {"kind": "speckv-steps", "schema": SCHEMA_VERSION}


def test_a_unit_counts_once_however_often_it_is_written(tmp_path: Path) -> None:
    one, two = StepWriter(tmp_path / "steps-a.jsonl"), StepWriter(tmp_path / "steps-b.jsonl")
    one.write(unit(), steps(3))
    one.write(unit(), steps(3))
    two.write(unit(), steps(5))  # a worker that was restarted under another name
    assert [len(r.steps) for r in read_units(tmp_path)] == [3]


@pytest.mark.parametrize("cut", [1, 40, 500, 900])
def test_a_killed_writer_leaves_a_file_that_can_be_continued(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "steps-nf4.jsonl"
    writer = StepWriter(path)
    writer.write(unit(), steps(3))
    size = path.stat().st_size
    writer.write(unit("p2"), steps(3))
    writer.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])  # killed within the second unit
    assert [r.unit.prompt for r in read_units(tmp_path)] == ["p1"]

    writer = StepWriter(path)
    assert writer.done == {unit().key}
    assert path.stat().st_size == size
    writer.write(unit(), steps(3))
    writer.write(unit("p2"), steps(2))
    assert [(r.unit.prompt, len(r.steps)) for r in read_units(tmp_path)] == [("p1", 3), ("p2", 2)]


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "steps-nf4.jsonl"
    path.write_bytes(b'{"kind":"spe')
    StepWriter(path).write(unit(), steps(1))
    assert len(read_units(tmp_path)) == 1


def test_broken_and_foreign_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps-nf4.jsonl"
    StepWriter(path).write(unit(), steps(2))
    good = path.read_text().splitlines()

    def refused(lines: list[str], message: str) -> None:
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=message):
            read_units(tmp_path)
        with pytest.raises(UserError, match=message):
            StepWriter(path)

    refused([good[0], "{nonsense", *good[1:]], r"steps-nf4.jsonl:2: broken")
    refused([good[0], good[1], good[3]], r"steps-nf4.jsonl:3: broken.*1 of 2 steps are missing")
    refused([good[0], '{"level":"nf4"}', *good[1:]], r"steps-nf4.jsonl:2: broken")
    refused(good[1:], "does not start like")
    refused([json.dumps({"kind": "speckv-steps", "schema": SCHEMA_VERSION + 1})], "newer than this version")


def test_a_run_is_continued_only_with_the_same_settings(tmp_path: Path) -> None:
    config = {"seed": 0, "levels": ("fp16", "nf4"), "out": "a"}
    assert not RunDir.open(tmp_path / "run", config, volatile=("out",)).resumed
    assert RunDir.open(tmp_path / "run", config | {"out": "b"}, volatile=("out",)).resumed
    with pytest.raises(UserError, match=r"other settings \(levels, seed\)"):
        RunDir.open(tmp_path / "run", {"seed": 1, "levels": ("fp16",), "out": "a"}, volatile=("out",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="neither empty nor a run directory"):
        RunDir.open(tmp_path / "mine", config)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*choose another --out"):
        RunDir.open(tmp_path / "file" / "run", {})
    with pytest.raises(UserError, match="cannot write to /proc"):
        RunDir.open("/proc/run", {})


def test_manifests_come_back_and_broken_ones_do_not(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", {})
    run.write_manifest({"status": "running"})
    assert read_manifest(tmp_path / "run") == {"status": "running"}
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match="is broken"):
        read_manifest(tmp_path / "run")
    with pytest.raises(UserError, match="give the directory of a run"):
        read_manifest(tmp_path)


def test_arrays_are_saved_whole_and_nothing_is_unpickled(tmp_path: Path) -> None:
    path = save_arrays(tmp_path / "policy-x.npz", {"A": np.eye(3), "cost.nf4.b": np.arange(2)})
    assert sorted(load_arrays(path)) == ["A", "cost.nf4.b"]
    with pytest.raises(ValueError, match="Python objects"):
        save_arrays(path, {"A": np.array([{}], dtype=object)})
    assert sorted(load_arrays(path)) == ["A", "cost.nf4.b"]  # the earlier file is untouched
    assert [p.name for p in tmp_path.iterdir()] == ["policy-x.npz"]

    (tmp_path / "bad.npz").write_bytes(pickle.dumps(print))
    np.savez(tmp_path / "objects.npz", A=np.array([print], dtype=object))
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-30])
    for name in ("bad.npz", "objects.npz", "cut.npz", "absent.npz"):
        with pytest.raises(UserError):
            read_checkpoint(tmp_path / name)


WRITE_UNTIL_FULL = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.records import steps, unit
from speckv_online.io.run_directory import StepWriter, save_arrays
from speckv_online.console import run_command
import numpy as np
folder = Path({folder!r})
def command():
    writer = StepWriter(folder / "steps-nf4.jsonl")
    for i in range(1000):
        writer.write(unit(f"p{{i}}"), steps(4))
def checkpoint():
    save_arrays(folder / "policy-x.npz", {{"A": np.zeros(20_000)}})
code = run_command("speckv", command)
sys.exit(code if run_command("speckv", checkpoint) == code else 99)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    # A limit on file sizes is a full disk as far as write() is concerned, and needs no disk of its own.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    script = WRITE_UNTIL_FULL.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("speckv: error: cannot write ") for line in lines)
    assert (tmp_path / "steps-nf4.jsonl").read_bytes().endswith(b"}\n")
    units = read_units(tmp_path)
    assert units
    assert all(len(r.steps) == 4 for r in units)
    assert [p.name for p in tmp_path.iterdir()] == ["steps-nf4.jsonl"]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="device or a pipe"):
        save_arrays(pipe, {"a": np.zeros(1)})
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
