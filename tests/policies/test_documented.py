"""The documentation's example policy runs, and its table names what there is; the benchmark prints what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.bench import policies as bench
from policies.base import Context
from policies.registry import BUILTIN, make_policy

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


def test_example_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCS.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    spec = re.search(r"runs as\s`(twice:[^`]*)`", text)
    assert code is not None
    assert spec is not None
    (tmp_path / "twice.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    policy = make_policy(spec[1])
    assert policy.decide(Context()).gamma == 2
    assert policy.decide(Context(last_accepted=3)).gamma == 6


def test_every_policy_is_described() -> None:
    table = DOCS.read_text(encoding="utf-8").split("## What there is")[1].split("##")[0]
    named = {
        name.split(":")[0]
        for row in table.splitlines()
        for name in re.findall(r"`([^`]*)`", row.split("|")[1] if "|" in row else "")
    }
    assert named == set(BUILTIN)


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--steps", "200", "--policies", "fixed:2,svip,leviathan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == [bench.REFERENCE, "fixed:2", "svip", "leviathan"]
    assert set(rows["fixed:2"]) == {"decide_p50", "decide_p99", "learn_p50", "learn_p99", "step_mean"}
    assert "proceed_p50" in rows["svip"]
    assert all(value > 0 for row in rows.values() for value in row.values())
    assert bench.main(["--steps", "200", "--policies", "fixed:2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert table[3].startswith("fixed:2 ")
