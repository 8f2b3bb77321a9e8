"""Comparisons that remember: a run starts from what earlier ones learnt, level by level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.compare.__main__ import main
from experiments.runtime.learner import START, Key, Learner, checkpoint_name, read_checkpoint
from speckv_online.learned.store import Store, read_file
from tests.support.runs import COUNTER, HERMIT, flags, make_config, write_prompts
from tests.support.tiny_models import TinyPair

LEVELS = ("fp32", "fp16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compare(pair: TinyPair, folder: Path, name: str, *more: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    prompts = write_prompts(folder / "prompts.jsonl")
    config = make_config(pair, prompts=str(prompts), out=str(folder / name), **changes)
    assert main([*flags(config), *more]) == 0
    return folder / name, json.loads((folder / name / "run.json").read_text())


def totals(spec: str) -> dict[str, float]:
    """What is stored of a policy that counts, by level."""
    found = {}
    for name, head in Store().entries().items():
        assert head is not None
        if head["key"]["policy"] == spec:
            found[head["key"]["level"]] = float(read_file(Store().path(name)).state["total"])
            assert head["tokens"] == found[head["key"]["level"]]
    return found


def test_nothing_is_kept_without_the_flag(tiny_pair: TinyPair, tmp_path: Path, cache: Path) -> None:
    compare(tiny_pair, tmp_path, "run", levels=("fp32",), policies=(COUNTER,))
    assert not (cache / "learned").exists()


def test_runs_add_up_by_level(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """A policy whose statistics add up, one whose state is kept whole, one that learns costs only, and the flagship."""
    policies = ("fixed:2", COUNTER, HERMIT, "mlp16", "online")
    for runs in (1, 2):
        out, manifest = compare(tiny_pair, tmp_path, f"run{runs}", "--remember", policies=policies)
        for spec in (COUNTER, HERMIT):
            assert totals(spec) == dict.fromkeys(LEVELS, 3 * 12.0 * runs)
            for level in LEVELS:
                key = Key(spec, 0, level if spec == COUNTER else f"{level}.0")
                state, batches = read_checkpoint(out / checkpoint_name(key))
                assert float(state["total"]) == 3 * 12.0 * runs
                assert ((START, 0) in batches) == (runs > 1)
        for level in LEVELS:
            known = manifest["workers"][level]["remembered_steps"]
            assert set(known) == ({COUNTER, HERMIT, "mlp16", "online"} if runs > 1 else set())
            assert manifest["workers"][level]["faults"] == {}
        assert any("--remember" in note for note in manifest["notes"])


def test_every_order_starts_from_what_was_there_before(tiny_pair: TinyPair, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"levels": ("fp32",), "policies": (COUNTER,), "orders": 2}
    compare(tiny_pair, tmp_path, "one", "--remember", **changes)
    out, _ = compare(tiny_pair, tmp_path, "two", "--remember", **changes)
    assert totals(COUNTER) == {"fp32": 4 * 36.0}
    for seed in (0, 1):
        state, _ = read_checkpoint(out / checkpoint_name(Key(COUNTER, seed, "fp32")))
        assert float(state["total"]) == 2 * 36.0 + 36.0


def test_a_run_that_goes_on_takes_its_own_statistics_up(tiny_pair: TinyPair, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"levels": ("fp32",), "policies": (COUNTER,)}
    compare(tiny_pair, tmp_path, "one", "--remember", **changes)
    out, _ = compare(tiny_pair, tmp_path, "two", "--remember", **changes)
    steps = out / "steps-fp32.jsonl"
    lines = steps.read_text().splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if '"done"' in line]
    steps.write_text("".join(lines[: ends[1] + 1]))  # killed before the third unit was written
    assert main(["--resume", str(out)]) == 0
    state, _ = read_checkpoint(out / checkpoint_name(Key(COUNTER, 0, "fp32")))
    assert float(state["total"]) == 72.0  # the third unit's batch counts once


def test_settings_come_from_yaml_too(tiny_pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("remember: true\n")
    compare(tiny_pair, tmp_path, "run", "--config", str(file), levels=("fp32",), policies=(COUNTER,))
    assert totals(COUNTER) == {"fp32": 36.0}


def test_a_start_counts_only_where_nothing_was_added(tmp_path: Path) -> None:
    key, learner = Key(COUNTER, 0, "fp32"), Learner(tmp_path)
    assert learner.sync(START, 0, {key: {"total": np.array(5.0)}}, True)[key] == (1, {"total": 5.0})
    assert learner.sync(START, 0, {key: {"total": np.array(7.0)}}, True)[key] == (1, {"total": 5.0})
    assert learner.sync("a", 0, {key: {"total": np.array(1.0)}})[key] == (2, {"total": 6.0})
    late = Learner(tmp_path)
    assert late.sync(START, 0, {key: {"total": np.array(7.0)}}, True)[key] == (2, {"total": 6.0})
