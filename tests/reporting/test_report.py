"""Reports from the files of a run alone: rows, intervals, the verdict, and what they must not claim."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speckv_online.io.run_directory import StepWriter, Unit
from speckv_online.reporting.report import build_report, to_json, to_markdown, to_text, write_report
from speckv_online.stats import Estimate
from tests.support.records import STEP
from tests.support.tiny_models import loaded_after

UNIT = Unit("nf4", "fixed:4", "p", "chat", 0)


def make_run(folder: Path, speeds: dict[tuple[str, str], float], prompts: int = 12, spread: float = 0.02) -> Path:
    """A run directory with made-up step times: tokens per second by level and policy."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for (level, policy), speed in speeds.items():
        writer = StepWriter(folder / f"steps-{level}.jsonl")
        for i in range(prompts):
            unit = replace(UNIT, level=level, policy=policy, prompt=f"p{i}")
            seconds = 3 / speed * (1 + i / 4) * rng.normal(1, spread)  # prompts differ, alike for all policies
            writer.write(unit, [replace(STEP, step=j, seconds=seconds) for j in range(4)], {"output": [i]})
        writer.close()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "config": {}, "hardware": {}, "workers": {}}))
    return folder


def test_the_verdict_says_no_more_than_the_intervals(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {
            ("fp16", "autoregressive"): 20, ("fp16", "online"): 19, ("fp16", "fixed:4"): 10,
            ("int8", "autoregressive"): 5, ("int8", "online"): 6, ("int8", "fixed:4"): 5.98,
            ("nf4", "autoregressive"): 7, ("nf4", "online"): 7.01, ("nf4", "fixed:4"): 6,
        },
    )  # fmt: skip
    verdict = build_report(run).verdict
    fp16, int8, nf4 = verdict.rstrip(".").split("; at ")
    assert fp16.startswith("At fp16 autoregressive was fastest (")
    assert int8.startswith("int8 there was no clear difference between online and fixed:4 (up to ")
    assert int8.endswith(" times autoregressive)")
    assert "no clear difference between" in nf4
    assert "which may be chance" in nf4 or "autoregressive and online" in nf4


def test_few_prompts_are_called_few(tmp_path: Path) -> None:
    speeds = {("fp16", "autoregressive"): 20.0, ("fp16", "fixed:4"): 10.0}
    few = build_report(make_run(tmp_path / "few", speeds, prompts=2))
    assert few.verdict.startswith("On 2 prompts, too few to be sure: at fp16 ")
    one = build_report(make_run(tmp_path / "one", speeds, prompts=1))
    assert "no clear difference" in one.verdict
    assert any("single prompt" in note for note in one.notes)
    assert to_json(one)["rows"][1]["speedup"]["low"] is None
    assert "NaN" not in json.dumps(to_json(one))


def test_rows_and_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {("nf4", "autoregressive"): 10, ("nf4", "fixed:4"): 15})
    row = build_report(run).rows[1]
    assert (row.prompts, row.steps, row.tokens) == (12, 48, 144)
    assert (row.tokens_per_step, row.acceptance, row.mean_gamma) == (3, 0.5, 4)
    assert row.decision_microseconds == pytest.approx(10)
    assert isinstance(row.speedup, Estimate)
    assert row.speedup.value == pytest.approx(1.5, rel=0.05)
    assert 1.4 < row.speedup.low < row.speedup.value < row.speedup.high < 1.6


def test_a_report_without_a_baseline_or_with_missing_prompts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {("nf4", "fixed:2"): 10, ("nf4", "fixed:4"): 15})
    report = build_report(run)
    assert all(row.speedup is None for row in report.rows)
    assert "fixed:4 was fastest" in report.verdict
    other = make_run(tmp_path / "other", {("nf4", "autoregressive"): 10})
    writer = StepWriter(other / "steps-late.jsonl")
    writer.write(replace(UNIT, prompt="p3"), [STEP], {"output": [4]})  # one prompt so far, and not the same tokens
    report = write_report(other)
    assert report.rows[1].prompts == 1
    assert math.isnan(report.rows[1].speedup.low) if report.rows[1].speedup else False
    assert any("differ from autoregressive" in note and "fixed:4 1 of 1" in note for note in report.notes)
    assert (other / "plots" / "goodput.png").exists()


def test_text_and_markdown_show_every_row(tmp_path: Path) -> None:
    report = build_report(make_run(tmp_path / "run", {("fp16", "autoregressive"): 10, ("nf4", "fixed:4"): 15}))
    text, markdown = to_text(report), to_markdown(report)
    for shown in (text, markdown):
        assert "tokens/s" in shown
        assert "measured" in shown
        assert report.verdict in shown
    assert markdown.count("\n| ") == 3
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("fp16 ", "nf4 "))] == [
        ["fp16", "autoregressive"], ["nf4", "fixed:4"],
    ]  # fmt: skip


def test_a_report_needs_neither_torch_nor_ray() -> None:
    assert not loaded_after("import speckv_online.reporting.report", "torch", "transformers", "ray", "policies")
