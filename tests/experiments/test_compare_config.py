"""Settings of comparison runs: flags, YAML, ``--set``, ``--resume``, and what workers may use."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config import add_options, parse
from experiments.runtime.schedule import Node, plan
from experiments.runtime.settings import CompareConfig, Resources
from speckv_online.console import split_specs
from speckv_online.errors import UserError
from speckv_online.io.run_directory import RunDir
from tests.support.runs import ROOT


def test_specs_may_hold_commas_of_their_own() -> None:
    assert split_specs("autoregressive, fixed:4,online:strength=9,explore=ucb,mlp16") == (
        "autoregressive", "fixed:4", "online:strength=9,explore=ucb", "mlp16",
    )  # fmt: skip
    assert split_specs("fp16") == ("fp16",)
    assert split_specs(" , ") == ()


def test_every_flag_is_documented_and_read() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, CompareConfig)
    text = parser.format_help()
    for name in asdict(CompareConfig()):
        assert f"--{name.replace('_', '-')}" in text or name == "resources"  # has no flag: YAML or --set
    for name in ("--config", "--set", "--resume"):
        assert name in text
    read = parse(CompareConfig, ["--levels", "nf4", "--seed", "3", "--local", "--policies", "fixed:1,fixed:2"], "x", "")
    assert read == replace(CompareConfig(), levels=("nf4",), seed=3, local=True, policies=("fixed:1", "fixed:2"))


def test_yaml_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("levels: [int8, nf4]\npolicies: fixed:1,fixed:2\nprompts: 3\nmax-new-tokens: 7\n")
    read = parse(CompareConfig, ["--config", str(path), "--max-new-tokens", "9"], "x", "")
    assert read == replace(
        CompareConfig(), levels=("int8", "nf4"), policies=("fixed:1", "fixed:2"), prompts="3", max_new_tokens=9
    )
    for text, message in (
        ("level: fp16", "unknown setting 'level'"),
        ("seed: yes", "seed must be of type int"),
        ("local: 1", "local must be of type bool"),
        ("levels: [1]", "levels must be a list of names"),
        ("- a", "not a mapping"),
        ("a: [", "not valid YAML"),
        ("out: 2026-13-45", "not valid YAML"),
        ("resources: 3", "resources must hold settings by name"),
        ("resources: {nf4: 3}", "resources must hold settings by name"),
        ("resources: {nf4: {gpu: 1}}", "unknown setting 'gpu'; known are workers, threads, gpus"),
        ("resources: {nf4: {gpus: a}}", "gpus must be of type float"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            parse(CompareConfig, ["--config", str(path)], "x", "")
    with pytest.raises(UserError, match="cannot read"):
        parse(CompareConfig, ["--config", str(tmp_path / "absent.yaml")], "x", "")


@pytest.mark.parametrize("name", ["compare", "orders", "laptop", "gpu_cluster"])
def test_shipped_configs_are_valid(name: str) -> None:
    path = ROOT / "experiments" / "configs" / f"{name}.yaml"
    config = parse(CompareConfig, ["--config", str(path)], "x", "")
    if name == "compare":
        assert config == CompareConfig()


def test_yaml_may_switch_the_engine_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("engine: off\n")  # for YAML that is the word for false
    assert parse(CompareConfig, ["--config", str(path)], "x", "").engine == "off"
    assert parse(CompareConfig, ["--config", str(path), "--engine", "auto"], "x", "").engine == "auto"
    monkeypatch.delenv("SPECKV_ENGINE", raising=False)
    assert CompareConfig().engine == "auto"
    monkeypatch.setenv("SPECKV_ENGINE", "off")
    assert CompareConfig().engine == "off"
    for text in ("engine: fast", "engine: on"):
        path.write_text(text)
        with pytest.raises(UserError, match="engine must be"):
            parse(CompareConfig, ["--config", str(path)], "x", "")


def test_a_run_from_before_the_switch_goes_on(tmp_path: Path) -> None:
    config = json.loads(json.dumps(asdict(CompareConfig(engine="auto"))))
    del config["engine"]
    RunDir.open(tmp_path, config)
    assert RunDir.open(tmp_path, config | {"engine": "auto"}).resumed
    RunDir.open(tmp_path, config | {"engine": "auto"})
    with pytest.raises(UserError, match=r"other settings \(engine"):
        RunDir.open(tmp_path, config | {"engine": "off"})


def test_set_reaches_nested_settings_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("resources: {nf4: {threads: 2, gpus: 1}}\nseed: 4\n")
    given = ["--config", str(path), "--set", "resources.nf4.gpus=0.25", "--set", "resources.fp16.workers=3"]
    read = parse(
        CompareConfig, [*given, "--set", "max-new-tokens=7", "--set", "levels=nf4,fp16", "--seed", "5"], "x", ""
    )
    assert read.resources == {"nf4": Resources(threads=2, gpus=0.25), "fp16": Resources(workers=3)}
    assert (read.max_new_tokens, read.levels, read.seed) == (7, ("nf4", "fp16"), 5)
    for text, message in (
        ("seed", "must be of the form name=value"),
        ("sed=1", "unknown setting 'sed'"),
        ("seed.x=1", "seed must be of type int"),
        ("seed=a", "--set: seed must be of type int"),
        ("resources.nf4.gpus=[", "not a valid value"),
        ("out=2026-13-45", "not a valid value"),
        ("resources.nf4.gpus=-1", "must not be negative"),
        ("resources.int3.gpus=1", "int3 is none of the levels"),
    ):
        with pytest.raises(UserError, match=message):
            parse(CompareConfig, ["--set", text], "x", "")


def test_resume_takes_a_runs_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompareConfig(levels=("nf4",), resources={"nf4": Resources(threads=2)}, out="elsewhere")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(asdict(config) | {"prompts_sha256": "a"})))
    )
    assert parse(CompareConfig, ["--resume", str(tmp_path)], "x", "") == replace(config, out=str(tmp_path))
    changed = parse(CompareConfig, ["--resume", str(tmp_path), "--workers", "3"], "x", "")
    assert changed == replace(config, out=str(tmp_path), workers=3)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    at_home = parse(CompareConfig, ["--resume", f"~/{tmp_path.name}"], "x", "")
    assert at_home == replace(config, out=str(tmp_path))
    with pytest.raises(UserError, match="leave --config and --out away"):
        parse(CompareConfig, ["--resume", str(tmp_path), "--out", "x"], "x", "")
    with pytest.raises(UserError, match="cannot read the config"):
        parse(CompareConfig, ["--resume", str(tmp_path / "absent")], "x", "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": ()}, "--levels is empty"),
        ({"policies": ("fixed:1", "fixed:1")}, "--policies names something twice"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"orders": 0}, "--orders"),
        ({"threads": -1}, "--threads"),
        ({"target": "x"}, "go together"),
        ({"sharing": "some"}, "--sharing must be one of none, per-level, global"),
        ({"sync_every": 0}, "--sync-every"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompareConfig(**values)


def test_threads_never_exceed_the_cores() -> None:
    for cores in (1, 2, 3, 7, 8, 64):
        for threads in (0, 1, 2, 5):
            config = CompareConfig(threads=threads)
            if threads > cores:
                with pytest.raises(UserError, match="more than the"):
                    plan(config, [Node(cores)], 6)
                continue
            schedule = plan(config, [Node(cores)], 6)
            assert 1 <= schedule.slots <= 3
            assert schedule.slots * schedule.shares["fp16"].threads <= cores


def how(nodes: list[Node], blocks: int = 6, **settings: Any) -> str:
    return str(plan(CompareConfig(**settings), nodes, blocks).describe()["levels"])


def test_workers_run_side_by_side_where_they_fit() -> None:
    assert how([Node(2)]) == "one after the other"
    assert how([Node(8)], threads=1) == "side by side"
    assert how([Node(2)], threads=1) == "up to 2 at a time"
    assert how([Node(4), Node(4)], threads=4) == "up to 2 at a time"  # two machines
    assert how([Node(4), Node(4)], threads=3) == "up to 2 at a time"  # a worker does not stretch over two machines
    assert how([Node(4)], levels=("nf4",)) == "alone"
    assert how([Node(4)], levels=("nf4",), workers=2) == "side by side"  # two threads each
    assert how([Node(4)], levels=("nf4",), workers=9, blocks=1) == "alone"  # one prompt needs one worker
    assert how([Node(8)], local=True, workers=4, threads=1) == "one after the other"


def test_gpus_are_shared_out_by_level() -> None:
    node = Node(8, 1.0)
    whole = plan(CompareConfig(threads=1), [node], 6)
    assert {share.gpus for share in whole.shares.values()} == {1.0}
    assert whole.slots == 1
    parts = CompareConfig(
        threads=1, resources={"fp16": Resources(gpus=0.5), "default": Resources(gpus=0.25, workers=1)}
    )
    assert plan(parts, [node], 6).slots == 3
    assert plan(replace(parts, device="cpu"), [Node(8)], 6).shares["fp16"].gpus == 0
    assert plan(CompareConfig(threads=1), [Node(8)], 6).shares["fp16"].gpus == 0  # there are none
    with pytest.raises(UserError, match="no machine has both"):
        plan(CompareConfig(threads=4, resources={"nf4": Resources(gpus=1.0)}), [Node(8), Node(2, 1.0)], 6)
