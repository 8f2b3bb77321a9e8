"""Runs that are killed, run out of disk, or cannot load a level: what they leave behind, and how they go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.compare.__main__ import main
from experiments.runtime.learner import Key, checkpoint_name, read_checkpoint
from experiments.runtime.settings import CompareConfig
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive
from speckv_online.io.run_directory import read_manifest, read_units
from tests.support.runs import COUNTER, HERMIT, flags, make_config, write_prompts
from tests.support.tiny_models import TinyPair

KILLS = 14


@pytest.fixture
def config(tiny_pair: TinyPair, tmp_path: Path) -> CompareConfig:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    return make_config(
        tiny_pair, levels=("fp32",), policies=("fixed:2", COUNTER, HERMIT), prompts=str(prompts), sync_every=3
    )


def outputs(run: Path) -> dict[tuple[str, str, str, int], list[int]]:
    """The output of every unit, each of which is there once."""
    results = read_units(run)
    lines = [line for file in run.glob("steps-*.jsonl") for line in file.read_text().splitlines()]
    assert sum('"done":' in line for line in lines) == len(results)
    assert sum('"done":' not in line for line in lines) == sum(len(r.steps) for r in results) + len(
        list(run.glob("steps-*"))
    )
    return {r.unit.key: r.facts["output"] for r in results}


def learnt(run: Path, levels: tuple[str, ...]) -> list[tuple[float, list[tuple[str, int]]]]:
    """What the policies' checkpoints hold: tokens counted, and the batches that they came in."""
    keys = [Key(COUNTER, 0), *(Key(HERMIT, 0, f"{level}.0") for level in levels)]
    found = [read_checkpoint(run / checkpoint_name(key)) for key in keys]
    return [(float(state["total"]), sorted(batches)) for state, batches in found]


def quietly(arguments: list[str], log: Path) -> None:
    """Run the command in a forked process, with its output in a file."""
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(arguments)
    os._exit(code)


def start(arguments: list[str], log: Path) -> Any:
    """Start the command in a process of its own, forked so that it need not import everything again."""
    job = multiprocessing.get_context("fork").Process(target=quietly, args=(arguments, log))
    job.start()
    return job


def test_a_job_that_is_killed_again_and_again_ends_as_if_it_had_not_been(config: CompareConfig, tmp_path: Path) -> None:
    """SIGKILL of the whole job (without Ray) at seeded random moments; it goes on by --resume or the same command."""
    rng, log, whole = random.Random(0), tmp_path / "log", tmp_path / "whole"
    started = time.time()
    job = start(flags(config, "--out", whole), log)
    job.join(300)
    assert job.exitcode == 0, log.read_text()
    usual = (whole / "steps-fp32.jsonl").stat().st_mtime - started  # until all was decoded; then it draws its report
    expected = outputs(whole), learnt(whole, config.levels)

    kills = halfway = 0
    for run in (tmp_path / f"run{i}" for i in range(KILLS)):
        while kills < KILLS and (not run.exists() or len(finished(run)) < len(expected[0])):
            resume = (run / "config.yaml").exists() and rng.random() < 0.5
            job = start(["--resume", str(run)] if resume else flags(config, "--out", run), log)
            job.join(rng.uniform(0.1, 1.1) * usual)
            job.kill()
            job.join(60)
            kills += job.exitcode == -signal.SIGKILL
            halfway += 0 < len(finished(run)) < len(expected[0])
        if kills == KILLS:
            job = start(flags(config, "--out", run), log)
            job.join(300)
            assert job.exitcode == 0, log.read_text()
            assert read_manifest(run)["status"] == "finished"
            assert "Traceback" not in log.read_text()
        assert (outputs(run), learnt(run, config.levels)) == expected
        if kills == KILLS:
            break
    assert kills == KILLS
    assert halfway  # some kills came in the middle of the records


def finished(run: Path) -> set[str]:
    """The lines that finished units left, as they are on disk after a kill."""
    return {line for file in run.glob("steps-*.jsonl") for line in file.read_text().splitlines() if '"done":' in line}


def test_a_level_that_cannot_be_loaded(
    config: CompareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_pair: TinyPair
) -> None:
    """A level whose weights cannot be read fails alone; put right, the run is completed."""
    out, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(tiny_pair.target_dir, target)
    weights = target / "model.safetensors"
    good = weights.read_bytes()
    weights.with_suffix(".broken").write_bytes(good[:1000])
    policies = "autoregressive", f"tests.support.runs:Vandal:file={weights}"
    config = replace(config, target=str(target), levels=("fp32", "fp16"), policies=policies)

    assert main(flags(config, "--out", out)) == 1
    shown = capsys.readouterr()
    assert {r.unit.level for r in read_units(out)} == {"fp32"}
    assert "Not everything was decoded at fp16: " in shown.out
    assert "fp16 failed: " in shown.err
    manifest = read_manifest(out)
    assert manifest["status"] == "incomplete"
    assert list(manifest["failed"]) == ["fp16"]
    assert "Not everything was decoded at fp16" in (out / "report.html").read_text()

    weights.write_bytes(good)
    assert main(["--resume", str(out)]) == 0
    assert "Not everything" not in capsys.readouterr().out
    assert len(outputs(out)) == 12
    assert read_manifest(out)["failed"] == {}


def test_a_full_disk_ends_one_level_and_not_the_run(config: CompareConfig, tmp_path: Path) -> None:
    """Real write errors while the first level runs; the disk is free again later."""
    out, log, brim = tmp_path / "run", tmp_path / "log", "tests.support.runs:Brim"
    config = replace(config, levels=("fp32", "fp16"), policies=("autoregressive", brim))
    job = start(flags(config, "--out", out), log)
    job.join(300)
    shown = log.read_text()
    assert job.exitcode == 1, shown
    assert "Traceback" not in shown
    assert "fp32 failed: cannot write" in shown
    assert "Not everything was decoded at fp32: cannot write" in shown
    counts = {level: sum(r.unit.level == level for r in read_units(out)) for level in config.levels}
    assert counts["fp16"] == 6
    assert 0 < counts["fp32"] < 6


def test_two_processes_do_not_write_one_run(config: CompareConfig, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with exclusive(out):
        assert main(flags(config, "--out", out)) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == [".lock"]
    with exclusive(out), pytest.raises(UserError, match="another process"), exclusive(out):
        pass


def test_a_run_does_not_go_on_with_other_weights(
    config: CompareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_pair: TinyPair
) -> None:
    out, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(tiny_pair.target_dir, target)
    config = replace(config, target=str(target), levels=("fp32", "fp16"), policies=("autoregressive",))
    assert main(flags(config, "--out", out)) == 0
    models = read_manifest(out)["workers"]
    file = out / "steps-fp16.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    left = len(read_units(out))
    shutil.copy(tiny_pair.draft_dir / "model.safetensors", target)
    capsys.readouterr()
    assert main(["--resume", str(out)]) == 1
    assert "fp16 failed: the target has other weights than at fp32 before" in capsys.readouterr().err
    assert len(read_units(out)) == left
    manifest = read_manifest(out)
    assert (manifest["status"], manifest["workers"]) == ("incomplete", models)


def test_a_damaged_file_of_records_ends_a_run(config: CompareConfig, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    config = replace(config, levels=("fp32", "fp16"), policies=("autoregressive",))
    assert main(flags(config, "--out", out)) == 0
    file = out / "steps-fp32.jsonl"
    file.write_bytes(file.read_bytes().replace(b"{", b"", 2))
    assert main(["--resume", str(out)]) == 2
    assert read_manifest(out)["status"] == "incomplete"
    assert list(read_manifest(out)["failed"]) == ["fp32"]
