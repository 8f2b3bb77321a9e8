"""The benchmark of long outputs."""

from __future__ import annotations

import json

import pytest

from experiments.bench.long import SPAN, main, repeated


def test_repeated_text_is_counted() -> None:
    text = list(range(20))
    assert repeated(text) == 0.0
    assert repeated(text + text) == (20 - SPAN + 1) / 40
    assert repeated([7] * 100) == pytest.approx((100 - SPAN) / 100)
    assert repeated([1, 2]) == repeated([]) == 0.0


@pytest.mark.slow
def test_it_measures_long_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--levels",
        "fp16",
        "--prompts",
        "2",
        "--warm-up",
        "0",
        "--context",
        "150",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    (level,) = found["levels"]
    assert found["kind"] == "measured"
    assert level["mean_prompt_tokens"] >= 150
    assert level["differing"] == 0
    assert level["gain"]["low"] <= level["gain"]["ratio"] <= level["gain"]["high"]
    assert level["policy_ms_per_step"] > 0


@pytest.mark.parametrize("flags", [["--prompts", "0"], ["--context", "-1"], ["--levels", ""], ["--policy", "nobody"]])
def test_bad_settings_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
