"""Reports of made-up runs whose figures are known: advice, series over time, several runs side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speckv_online.cli.app import main
from speckv_online.io.run_directory import RunDir, StepWriter, Unit
from speckv_online.reporting.report import build_report, to_markdown, write_report, write_reports
from speckv_online.reporting.verdict import BASELINE, never_learns
from tests.support.records import STEP

CALIBRATION = {"draft_seconds": 0.01, "verify_seconds": [0.1], "overhead_seconds": 0.0}


def made_run(path: Path, speeds: dict[str, float], prompts: int = 6, level: str = "nf4") -> Path:
    """A finished run in which every policy takes ``speeds[policy]`` seconds per step of one draft and two tokens."""
    run = RunDir.open(path, {"made": "up"})
    worker: dict[str, Any] = {"level": level, "calibration": CALIBRATION, "arithmetic": "none", "device": "cpu"}
    run.write_manifest({"status": "finished", "config": {"policies": list(speeds)}, "workers": {level: worker}})
    writer = StepWriter(path / f"steps-{level}.jsonl")
    for i in range(prompts):
        for policy, seconds in speeds.items():
            drafted = 0 if policy == BASELINE else 1
            step = replace(
                STEP, gamma=drafted, drafted=drafted, accepted=drafted, labelled=drafted, produced=1 + drafted,
                forwards=drafted, seconds=seconds * (1 + 0.01 * i), mean_draft_confidence=0.75,
            )  # fmt: skip
            writer.write(Unit(level, policy, f"p{i}", "chat", 0), [replace(step, step=j) for j in range(8)])
    writer.close()
    return path


def test_advice_says_what_to_use_and_what_to_avoid(tmp_path: Path) -> None:
    report = build_report(made_run(tmp_path, {BASELINE: 0.1, "online": 0.15, "mlp16": 0.4}))
    (advice,) = report.advice
    assert advice.startswith("nf4: use online, 1.33 times [1.33, 1.33] autoregressive")
    assert advice.endswith("avoid mlp16 (0.50 times).")


@pytest.mark.parametrize(
    ("speeds", "prompts", "expected"),
    [
        ({BASELINE: 0.1, "online": 0.15}, 2, "nf4: 2 prompts are too few to choose by; run at least 5."),
        (
            {BASELINE: 0.1, "online": 0.3}, 6,
            "nf4: do not draft; every policy here is slower than autoregressive decoding.",
        ),
        ({"online": 0.3}, 6, "nf4: only online ran; add other policies to compare it with."),
        ({"online": 0.1, "mlp16": 0.2}, 6, "nf4: use online; add autoregressive to see whether drafting pays at all."),
    ],
)  # fmt: skip
def test_advice_claims_no_more_than_the_run_shows(
    tmp_path: Path, speeds: dict[str, float], prompts: int, expected: str
) -> None:
    assert build_report(made_run(tmp_path, speeds, prompts)).advice == [expected]


def test_a_tie_with_plain_decoding_is_no_advice_to_draft(tmp_path: Path) -> None:
    (advice,) = build_report(made_run(tmp_path, {BASELINE: 0.1, "online": 0.2})).advice
    assert "no policy here is clearly faster than autoregressive decoding over 6 prompts" in advice


def test_few_prompts_have_no_p_value(tmp_path: Path) -> None:
    few = build_report(made_run(tmp_path / "few", {BASELINE: 0.1, "online": 0.15}, prompts=2))
    many = build_report(made_run(tmp_path / "many", {BASELINE: 0.1, "online": 0.15}))
    assert "p < 0.001" not in to_markdown(few)
    assert "p < 0.001" in to_markdown(many)


def test_series_are_those_of_the_records(tmp_path: Path) -> None:
    report = build_report(made_run(tmp_path, {BASELINE: 0.1, "online": 0.15}))
    regret = {r.policy: r for r in report.regret}
    assert regret["online"].seconds == [0.0] * 6
    assert regret[BASELINE].against == "online"
    # 8 tokens at 0.1 s each, against 0.075 s, with 1 % more for every prompt.
    assert regret[BASELINE].seconds == pytest.approx([0.2, 0.402, 0.606, 0.812, 1.02, 1.23])
    (shares,) = report.shares
    assert shares.policy == "online"
    assert set(shares.shares["1"]) == {1.0}
    (reliability,) = report.reliability
    assert (reliability.confidence, reliability.accepted, reliability.steps) == ([0.75], [1.0], [48])
    modelled = {m.policy: m for m in report.modelled}
    assert modelled["online"].modelled == pytest.approx(2 / 0.11)
    assert modelled["online"].measured == pytest.approx(2 / 0.15 / 1.025)


def test_what_learning_gains_is_said_once_and_drawn(tmp_path: Path) -> None:
    run = made_run(tmp_path, {BASELINE: 0.1, "mlp16": 0.12, "online": 0.15})
    report = build_report(run)
    (gain,) = report.gain
    assert (gain.policy, gain.against, len(gain.ratios)) == ("online", "mlp16", 6)
    assert gain.ratios == pytest.approx([0.12 / 0.15] * 6)  # two tokens a step under either
    assert report.learning == [
        "Does learning pay? online against mlp16, which never learns: nf4 no, 0.80 times [0.80, 0.80]."
    ]
    assert all(shares.acceptance == [1.0] * len(shares.steps) for shares in report.shares)
    write_report(run)
    assert (run / "plots" / "gain-nf4-online.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("policy", "others", "expected"),
    [
        ("online", ["mlp16", "online:learn=none", "mlp16:read=step"], "online:learn=none"),
        ("online:cap=4", ["mlp16", "mlp16:read=step"], "mlp16:read=step"),
        ("online", ["fixed:4"], ""),
        ("online:learn=none", ["mlp16"], ""),
        ("linucb", ["mlp16"], ""),
    ],
)
def test_learning_is_judged_by_the_frozen_copy_where_one_ran(policy: str, others: list[str], expected: str) -> None:
    assert never_learns(policy, others) == expected


def test_an_unfinished_calibration_leaves_the_modelled_part_out(tmp_path: Path) -> None:
    made_run(tmp_path, {BASELINE: 0.1, "online": 0.15})
    manifest = json.loads((tmp_path / "run.json").read_text())
    manifest["workers"] = {"nf4": {}}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    assert build_report(tmp_path).modelled == []


def test_every_picture_of_the_markdown_is_written(tmp_path: Path) -> None:
    write_report(made_run(tmp_path, {BASELINE: 0.1, "online": 0.15}))
    text = (tmp_path / "report.md").read_text()
    pictures = {line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {f"plots/{file.name}" for file in (tmp_path / "plots").iterdir()}
    assert pictures > {"plots/goodput.png", "plots/regret-nf4.png", "plots/gamma-nf4-online.png"}


def test_runs_of_one_name_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "a" / "run", {BASELINE: 0.1, "online": 0.15})
    made_run(tmp_path / "b" / "run", {BASELINE: 0.2}, level="int8")
    out = tmp_path / "both"
    assert main(["report", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "--out", str(out)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["level", "policy", "a/run", "b/run"]
    assert [row.split()[:2] for row in rows if row.startswith(("nf4 ", "int8 "))] == [
        ["nf4", BASELINE], ["nf4", "online"], ["int8", BASELINE],
    ]  # fmt: skip
    assert (out / "report.md").read_text().count("# a/run") == 1
    page = (out / "report.html").read_text()
    assert "<h1>b/run</h1>" in page
    assert "http" not in page


def test_units_without_steps_are_left_out(tmp_path: Path) -> None:
    run = made_run(tmp_path, {BASELINE: 0.1})
    StepWriter(run / "steps-peers.jsonl").write(Unit("nf4", "transformers", "p0", "chat", 0), [], {"call_seconds": 1.0})
    report = write_report(run)
    assert [row.policy for row in report.rows] == [BASELINE]
    assert "Without step records, and so in no figure here: nf4 transformers." in report.notes


def test_out_may_be_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_reports([made_run(tmp_path / "run", {BASELINE: 0.1})], "~/both")
    assert (tmp_path / "both" / "report.html").exists()


def test_out_is_for_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run", {BASELINE: 0.1})
    assert main(["report", str(run), "--out", str(tmp_path / "x")]) == 2
    assert "--out is for several runs" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"\nReport: {run}/report.html\n")
    assert (run / "report.html").exists()


def test_a_pipe_in_a_policy_name_does_not_break_the_table(tmp_path: Path) -> None:
    (report,) = write_reports([made_run(tmp_path / "r", {"a|b": 0.1})], tmp_path / "o")
    assert "| a\\|b |" in to_markdown(report)
