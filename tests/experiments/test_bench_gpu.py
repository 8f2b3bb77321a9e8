"""The GPU benchmark, small and on a CPU: every stage runs to its end, and says what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.bench.gpu import __main__ as script
from experiments.bench.gpu.__main__ import forget, main, run_command
from experiments.bench.gpu.host import host_gaps
from experiments.bench.gpu.lossless import chi_square
from experiments.bench.gpu.settings import BUDGETS, START, TOTAL, GpuConfig, Stage
from experiments.bench.gpu.targets import targets
from speckv_online.simulate.cost_table import load_cost
from tests.support.runs import ROOT, environment


def read(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / f"{stage}.json").read_text())


@pytest.mark.slow
def test_one_stage_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.bench.gpu", "--device", "cpu", "--tiny", "--seconds", "120"]
    done = subprocess.run(
        [*command, "--stages", "host", "--out", str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 parts skipped, 0 failed" in done.stderr
    assert read(tmp_path, "host")["complete"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not os.environ.get("SPECKV_GPU_SCRIPT"), reason="takes ten minutes: set SPECKV_GPU_SCRIPT=1")
def test_all_stages_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.bench.gpu", "--device", "cpu", "--tiny", "--seconds", "500"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(BUDGETS)} of {len(BUDGETS)} stages ended well" in done.stdout + done.stderr
    for stage in BUDGETS:
        found = read(tmp_path, stage)
        assert found["complete"], (stage, found["skipped"], found["failed"])
    greedy = read(tmp_path, "lossless")["greedy"]
    assert {(r["model"], r["level"]) for r in greedy} == {
        (m, level) for m in ("llama", "qwen3", "gemma") for level in ("fp32", "fp16", "int8", "nf4")
    }
    assert all(r["within"] for r in greedy)
    assert all(r["differing"] == 0 for r in greedy if r["level"] == "fp32")
    rows = read(tmp_path, "costs")["rows"]
    assert [r["graphs"] for r in rows if r["pair"] == "default"] == [True, False, True]  # 8-bit layers ask the device
    for name, levels in (("default", ["fp16", "int8", "nf4"]), *((s, ["bf16", "nf4"]) for s in ("1b", "3b", "8b"))):
        table = load_cost(tmp_path / f"cost-{name}.json")
        assert list(table.levels) == levels
        assert all(len(cost.verify_seconds) == 17 for cost in table.levels.values())
    decoded = read(tmp_path, "decoding")["rows"]
    assert {r["who"] for r in decoded} >= {"autoregressive", "fixed:8", "mlp16", "online", "transformers"}
    assert {r["size"] for r in read(tmp_path, "batches")["rows"]} == {1, 4, 16}
    ray = read(tmp_path, "ray")
    assert ray["units"] == ray["units_expected"] == ray["finished_lines"]
    assert ray["killed_drivers"] >= 1
    assert 0 < ray["units_before_the_kill"] < ray["units"]
    assert (ray["exit_code"], ray["status"], ray["prompts_with_several_outputs"]) == (0, "finished", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_runs_and_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "costs", "--out", str(tmp_path)]) == 0
    assert "costs: the whole stage skipped: no CUDA device was found" in capsys.readouterr().err
    assert not read(tmp_path, "costs")["complete"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "cost"], "unknown stage 'cost'"),
        (["--stages", "costs,costs"], "each once"),
        (["--device", "tpu"], "--device must be"),
        (["--seconds", "-1"], "--seconds must be"),
    ],
)
def test_bad_input(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_all_budgets_fit_into_nine_minutes() -> None:
    assert sum(BUDGETS.values()) + START * len(BUDGETS) <= TOTAL < 540


def test_a_part_that_is_late_or_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage("host", GpuConfig(out=str(tmp_path)), torch.device("cpu"))
    assert stage.attempt("fine", lambda: 5) == 5
    assert stage.attempt("broken", lambda: [][1]) is None
    stage.ends = 0.0
    assert stage.attempt("late", lambda: 5) is None
    found = read(tmp_path, "host")
    assert [x["what"] for x in found["failed"]] == ["broken"]
    assert found["skipped"] == [{"what": "late", "why": f"the stage's {BUDGETS['host']} s are over"}]
    assert "host: broken failed: IndexError" in capsys.readouterr().err


def test_chi_square_tells_right_from_wrong() -> None:
    rng, p = np.random.default_rng(0), [0.5, 0.3, 0.15, 0.04, 0.01]
    right = [chi_square(rng.multinomial(500, p).tolist(), p)[2] for _ in range(200)]
    assert 0.3 < np.mean(right) < 0.7
    assert np.mean([value < 0.05 for value in right]) < 0.12
    assert chi_square(rng.multinomial(500, [0.35, 0.45, 0.15, 0.04, 0.01]).tolist(), p)[2] < 1e-4
    statistic, freedom, chance = chi_square([60, 40], [0.5, 0.5])
    assert (statistic, freedom) == (4.0, 1)
    assert chance == pytest.approx(0.0455, abs=1e-4)  # of tables


def test_targets_say_what_was_not_measured(tmp_path: Path) -> None:
    assert all(t.line().endswith("not measured") for t in targets(tmp_path))
    rates = {"autoregressive": 100, "fixed:2": 120, "fixed:4": 90, "online": 119, "transformers:constant-4": 25}
    rows = [{"level": "fp16", "who": who, "tokens_per_second": rate} for who, rate in rates.items()]
    (tmp_path / "decoding.json").write_text(json.dumps({"rows": rows}))
    cost = {"pair": "1b", "level": "bf16", "five_over_one": 1.2}
    (tmp_path / "costs.json").write_text(json.dumps({"rows": [cost]}))
    lines = [t.line() for t in targets(tmp_path)]
    assert lines[0] == "ours over transformers at gamma 4, least of the levels >= 3: 3.6, met"
    assert lines[1].endswith(">= 0.98: 1.19, met")
    assert lines[2].endswith(">= 0.98: 0.992, met")
    assert lines[3] == "T(5)/T(1), 1b at bf16 <= 1.15: 1.2, missed"
    assert lines[4].endswith("not measured")
    (tmp_path / "decoding.json").write_text(json.dumps({"rows": rows, "device": "cpu", "tiny": True}))
    assert [t.value for t in targets(tmp_path)][:3] == [None] * 3  # a trial run says nothing of a GPU


def test_waiting_for_the_device_is_no_work_of_the_host() -> None:
    graphs = [(0.0, 2.0), (10.0, 11.0), (12.0, 13.0)]
    assert host_gaps(graphs, [(1.0, 3.0), (4.0, 9.0), (12.5, 20.0)]) == [2.0, 1.0]
    assert host_gaps(graphs[:1], []) == []


def test_files_of_an_earlier_run_do_not_pass_as_new(tmp_path: Path) -> None:
    for name in ("host.json", "costs.json", "cost-1b.json", "ray.json"):
        (tmp_path / name).write_text("{}")
    forget(tmp_path, ("costs", "host", "decoding"))
    assert [path.name for path in tmp_path.iterdir()] == ["ray.json"]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_late_stage_ends_what_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    """Interrupted first, and killed only where it does not notice."""
    monkeypatch.setattr(script, "TIDY", 1 if deaf else 60)
    tidy, code = tmp_path / "tidy", "import pathlib, signal, sys, time\n"
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if deaf else ""
    code += "try:\n time.sleep(600)\nfinally:\n pathlib.Path(sys.argv[1]).touch()\n"
    assert run_command([sys.executable, "-c", code, str(tidy)], "host", 5) == 1
    assert tidy.exists() != deaf
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"], "host", 60) == 3
