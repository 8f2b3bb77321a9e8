"""The main comparison: its tables from files alone, and a real run beside transformers' own generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.results import main
from experiments.results_tables import Level, bars, table
from speckv_online.errors import UserError
from speckv_online.records import StepRecord
from speckv_online.rundir import Unit, UnitResult, read_units
from speckv_online.smollm2 import smollm2_ready


def step(index: int, drafted: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=index, gamma=drafted, drafted=drafted, accepted=0, tested=min(1, drafted), produced=1,
        mean_draft_entropy=1.0, mean_draft_confidence=0.5, max_draft_entropy=1.0, min_draft_confidence=0.5,
        context_length=100, propensity=1.0, policy_version=0, decision_id=index, decide_seconds=0.0,
        draft_seconds=0.01 * drafted, verify_seconds=seconds - 0.01 * drafted, seconds=seconds,
    )  # fmt: skip


def call(policy: str, prompt: str, tokens: int, seconds: float, drafted: int = 0) -> UnitResult:
    steps = [] if policy.startswith("transformers") else [step(i, drafted, seconds / tokens) for i in range(tokens)]
    unit = Unit("fp16", policy, prompt, "chat", 0)
    return UnitResult(unit, steps, {"output": list(range(tokens)), "call_seconds": seconds})


@pytest.fixture
def level() -> Level:
    units = [
        call(policy, prompt, 10, seconds * scale, drafted)
        for prompt, scale in (("a", 1.0), ("b", 1.2), ("c", 0.8))
        for policy, seconds, drafted in (
            ("autoregressive", 1.0, 0),
            ("fixed:4", 2.0, 4),
            ("goodput", 0.8, 0),
            ("goodput+hybrid", 0.5, 2),
            ("transformers", 1.25, 0),
            ("transformers:constant-4", 2.5, 0),
        )
    ]
    return Level("fp16", [*units, call("fixed:1", "a", 10, 0.9, 1)])


def test_ratios_are_paired_and_hindsight_is_fair(level: Level) -> None:
    assert level.goodput("autoregressive") == pytest.approx(10.0)
    assert level.ratio("goodput", "autoregressive").value == pytest.approx(1.25)
    # fixed:1 decoded one prompt only: on that one it beats plain decoding, which is where they are compared.
    assert level.ratio("fixed:1", "autoregressive").value == pytest.approx(1 / 0.9)
    assert level.best("fixed") == "fixed:1"
    assert level.best("transformers") == "transformers"
    assert level.modelled_over_measured("fixed:4") == pytest.approx(1.0, abs=0.02)
    assert level.modelled_over_measured("goodput+hybrid") != level.modelled_over_measured("goodput+hybrid")


def test_tables_say_what_passes_and_what_fails(level: Level) -> None:
    lines = bars([level])
    product = next(line for line in lines if "the product over transformers' constant-4" in line)
    assert "5.000" in product
    assert "pass" in product
    best = next(line for line in lines if "`goodput` over the best fixed" in line)
    assert "1.125" in best
    level.calls["goodput"] = level.calls["fixed:4"]
    assert any("**fail**" in line for line in bars([level]))
    rows = table(level)
    assert sum("`transformers" in row for row in rows) == 3
    assert any(row.startswith("| `goodput+hybrid` | 3 | 20.00 |") for row in rows)


def test_unknown_contenders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("transformers:magic", "unknown schedule"), ("nobody", "nobody"), ("goodput+x", "drafter")):
        assert main(["--leading", name, "--others", "autoregressive", "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError):
        read_units(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_ready(), reason="the default pair is not prepared")
def test_real_run_is_lossless_and_goes_on_where_it_was(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text("<!-- measured: begin -->\n<!-- measured: end -->\n")
    arguments = ["--levels", "fp16", "--prompts", "1", "--some", "1", "--max-new-tokens", "6", "--others", "fixed:1"]
    arguments += ["--threads", "1", "--out", str(tmp_path / "run"), "--doc", str(doc)]
    contenders = "transformers,transformers:constant-4,autoregressive,goodput+hybrid"
    assert main([*arguments, "--leading", "transformers"]) == 0
    assert main([*arguments, "--leading", contenders]) == 0
    units = read_units(tmp_path / "run")
    assert sorted(u.unit.policy for u in units) == sorted([*contenders.split(","), "fixed:1"])
    assert len({json.dumps(u.facts["output"]) for u in units}) == 1  # everybody says what the target says
    assert "`goodput+hybrid`" in doc.read_text()
