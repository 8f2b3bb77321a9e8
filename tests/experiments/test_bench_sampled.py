"""The benchmark of sampled decoding, on tiny models: what it prints adds up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.bench.sampled import RATIOS, main
from tests.support.tiny_models import TinyPair


def test_it_prints_ratios_that_follow_from_its_rates(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--target", str(tiny_pair.target_dir), "--draft", str(tiny_pair.draft_dir), "--device", "cpu"]
    small = ["--levels", "fp32", "--prompts", "2", "--warm-up", "1", "--max-new-tokens", "12", "--threads", "1"]
    assert main([*models, *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["temperature"]) == ("measured", 0.7)
    (level,) = found["levels"]
    rates = level["tokens_per_second"]
    for what, (mine, base) in RATIOS.items():
        ratio = level["ratios"][what]
        assert ratio["ratio"] == pytest.approx(rates[mine] / rates[base])
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert np.isclose(found["mean"][what], ratio["ratio"])
    assert level["tokens"]["plain sampled"] == {"drafted": 0, "accepted": 0, "looked_up": 0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--temperature", "0"], "above 0"), (["--policy", "fixed:4"], "lookups"), (["--top-p", "0"], "top-p"),
     (["--prompts", "0"], "at least 1")],
)  # fmt: skip
def test_bad_settings_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
