"""The benchmark beside busy processes."""

from __future__ import annotations

import json

import pytest

from experiments.bench.company import main


@pytest.mark.slow
def test_it_measures_quiet_and_in_company(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--levels", "fp16", "--busy", "0,1", "--seconds", "0", "--max-new-tokens", "8", "--json"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "measured"
    assert [row["busy"] for row in found["rows"]] == [0, 1]
    for row in found["rows"]:
        assert row["texts"] == 1
        assert set(row["tokens_per_second"]) == {"one thread", "all threads", "chosen"}
        assert min(row["tokens_per_second"].values()) > 0


@pytest.mark.parametrize("flags", [["--busy", "-1"], ["--levels", ""], ["--policy", "nobody"], ["--seconds", "nan"]])
def test_bad_settings_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
