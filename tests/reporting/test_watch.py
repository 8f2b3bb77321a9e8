"""`speckv watch`: what it shows is what the files say, read piece by piece while they grow."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from speckv_online.cli.app import main
from speckv_online.errors import UserError
from speckv_online.io.run_directory import RunDir, StepWriter
from speckv_online.reporting.progress import Progress
from tests.support.records import steps, unit


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.open(tmp_path / "run", {"a": 1})
    made.write_manifest({"status": "running", "prompts": {"count": 2}, "seeds": [0, 1]})
    return made


def test_figures_grow_with_the_files(run: RunDir) -> None:
    progress = Progress(run.path)
    assert progress.update() == []
    writer = StepWriter(run.path / "steps-nf4.jsonl")
    writer.write(unit("p1"), steps(3))
    assert [r.unit.prompt for r in progress.update()] == ["p1"]
    assert progress.update() == []
    writer.write(unit("p2"), steps(2))
    assert [r.unit.prompt for r in progress.update()] == ["p2"]
    (row,) = progress.snapshot()["rows"]
    assert (row["prompts"], row["of"], row["tokens"]) == (2, 4, 15)
    assert row["tokens_per_second"] == pytest.approx(3 / 0.071)
    assert row["acceptance"] == pytest.approx(0.5)
    assert row["gamma_share"]["3–4"] == 1.0


def test_half_a_unit_waits_and_a_file_that_was_cut_back_counts_once(run: RunDir) -> None:
    file = run.path / "steps-nf4.jsonl"
    writer = StepWriter(file)
    writer.write(unit("p1"), steps(3))
    writer.write(unit("p2"), steps(3))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    progress = Progress(run.path)
    assert [r.unit.prompt for r in progress.update()] == ["p1"]
    file.write_bytes(whole)
    assert [r.unit.prompt for r in progress.update()] == ["p2"]
    file.write_bytes(whole[: len(whole) // 2])
    assert progress.update() == []
    StepWriter(file).write(unit("p3"), steps(1))
    assert [r.unit.prompt for r in progress.update()] == ["p3"]
    assert progress.snapshot()["rows"][0]["prompts"] == 3


@pytest.mark.parametrize("status", ["finished", "incomplete"])
def test_lines_come_while_a_run_goes_on_and_end_with_it(
    run: RunDir, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = StepWriter(run.path / "steps-nf4.jsonl")
    writer.write(unit("p1"), steps(3))

    def work() -> None:
        writer.write(unit("p2"), steps(3))
        run.write_manifest({"status": status})

    timer = threading.Timer(0.2, work)
    timer.start()
    assert main(["watch", str(run.path), "--interval", "0.05"]) == 0
    timer.join()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("nf4 fixed:4 on p1: 42.3 tokens/s, accepted 6 of 12 drafted, mean γ 4.00")
    assert second.endswith("so far 42.3 tokens/s over 2 prompts")


def test_once_as_a_table_and_as_json(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run.path), "--once"]) == 0
    assert capsys.readouterr().out == "run: running, no prompt finished yet\n"
    StepWriter(run.path / "steps-nf4.jsonl").write(unit(), steps(3))
    assert main(["watch", str(run.path), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["nf4", "fixed:4", "1/4", "42.25"]
    assert main(["watch", str(run.path), "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["policy"] == "fixed:4"


def test_units_without_steps_are_left_out(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    writer = StepWriter(run.path / "steps-nf4.jsonl")
    writer.write(unit("p1", "transformers"), [], {"call_seconds": 1.0})
    writer.write(unit(), steps(3))
    run.write_manifest({"status": "finished"})
    assert main(["watch", str(run.path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nf4 fixed:4 on p1")


def test_mistakes_are_told(tmp_path: Path, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        Progress(tmp_path)
    for interval in ("0", "nan", "1e20"):
        assert main(["watch", str(run.path), "--once", "--interval", interval]) == 2
        assert "--interval must be above zero and at most a day" in capsys.readouterr().err
