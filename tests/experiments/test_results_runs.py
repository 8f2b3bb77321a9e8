"""Runs of the main comparison that have nothing to decode, or must not start."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.common.bundled_prompts import bundled
from experiments.results.__main__ import main
from experiments.results.config import ResultsConfig
from speckv_online.io import manifest
from speckv_online.io.files import exclusive
from speckv_online.io.prompts import choose
from speckv_online.io.run_directory import RunDir, StepWriter, Unit, read_manifest
from tests.support.calls import call

LEADING, OTHERS = ("autoregressive", "fixed:4"), ("transformers", "transformers:constant-4")
FLAGS = ["--prompts", "3", "--some", "3", "--leading", ",".join(LEADING), "--others", ",".join(OTHERS)]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that decoded fp16 to its end, and an earlier contender of int8, on another machine."""
    path = tmp_path / "run"
    config = ResultsConfig(out=str(path), prompts=3, some=3, leading=LEADING, others=OTHERS, levels=("fp16", "int8"))
    run = RunDir.open(path, asdict(config), volatile=config.VOLATILE)
    for level, names in (("fp16", (*LEADING, *OTHERS)), ("int8", LEADING[:1])):
        writer = StepWriter(path / f"steps-{level}.jsonl")
        for prompt in choose(bundled("test"), 3, 0):
            for name in names:
                made = call(name, prompt.id, 8, 1.0)
                writer.write(Unit(level, name, prompt.id, prompt.task, 0), made.steps, made.facts)
        writer.close()
    facts = manifest.collect(levels=[{"level": name, "calibration": name} for name in ("fp16", "int8")])
    there = {"hardware": {"processor": "another"}, "git": {"commit": "0123456789", "dirty": False}}
    run.write_manifest(facts | there)
    return path


def test_a_finished_run_keeps_its_origin_and_the_other_levels(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_manifest(finished)
    home = finished.parent
    monkeypatch.setenv("HOME", str(home))
    (home / "doc.md").write_text("<!-- measured: begin -->\n<!-- measured: end -->\n")
    (home / "readme.md").write_text("<!-- headline: begin -->\n<!-- headline: end -->\n")
    places = ["--doc", "~/doc.md", "--readme", "~/readme.md", "--plot", "~/plot.png", "--out", "~/run"]
    assert main([*FLAGS, "--levels", "fp16", *places]) == 0
    after = read_manifest(finished)
    assert after.pop("settings")["levels"] == ["fp16"]
    assert after == before
    for text in (capsys.readouterr().out, *((home / name).read_text() for name in ("doc.md", "readme.md"))):
        assert "another, cores: None" in text
        assert "int8" not in text
    assert (home / "plot.png").exists()


def test_a_run_that_another_process_writes_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (finished / "config.yaml").read_text()
    with exclusive(finished):
        assert main([*FLAGS, "--levels", "fp16", "--out", str(finished)]) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert (finished / "config.yaml").read_text() == settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "-1"], "--threads must be at least 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--some", "0"], "--some must be at least 1"),
        (["--levels", "fp16,int3"], "unknown compression level 'int3'"),
        (["--levels", ""], "--levels is empty"),
        (["--pair", "nobody"], "unknown model pair 'nobody'"),
        (["--leading", "online,online"], "--leading names something twice"),
        (["--others", "transformers,transformers"], "--others names something twice"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*flags, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()
