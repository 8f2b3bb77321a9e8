"""The report on what signals add, from made traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import signals
from policies.acceptance.features import BEFORE, OWN
from policies.acceptance.model import AcceptanceModel
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.training.acceptance import tokens_from_traces
from tests.support.made_traces import made_trace


def test_every_column_is_in_one_group() -> None:
    for head, width in ((0, BEFORE), (1, OWN)):
        columns = [c for group in (*signals.GROUPS.values(), signals.ALWAYS) for c in group[head]]
        assert sorted(columns) == list(range(width))


def test_signals_left_out_stay_at_zero(tmp_path: Path) -> None:
    tokens = tokens_from_traces([made_trace(p, "nf4") for p in range(2)])
    np.savez(tmp_path / "w.npz", **signals.fit(tokens, ({0, 1, 9}, {0, 1})))
    acceptance_model = AcceptanceModel(tmp_path / "w.npz")
    before, after = acceptance_model.weights("nf4")
    assert {i for i, w in enumerate(before) if abs(w) > 1e-6} <= {0, 1, 9}
    assert abs(after[1]) > 0.1
    assert {i for i, w in enumerate(after) if abs(w) > 1e-6} <= {0, 1}


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for p in range(4):
        made_trace(p, "nf4", length=20).save(tmp_path / f"{p}.npz")
    out = tmp_path / "signals.md"
    code = signals.main(["--traces", str(tmp_path), "--folds", "2", "--seeds", "1", "--out", str(out)])
    assert code == 0
    table = [line for line in out.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(signals.GROUPS)
    assert all(0.0 < float(cell) < 3.0 for line in table[2:] for cell in line.split("|")[2:-1])
    cost = CostTable("rtx3090-release", {"nf4": LevelCost(0.01, (0.1,))}).save(tmp_path / "cost.json")
    for flags, said in (
        ([], "give --traces"),
        (["--traces", str(tmp_path), "--costs", ","], "--costs must name at least one"),
        (["--traces", str(tmp_path), "--seed", "-1"], "--seed at least 0"),
        (["--traces", str(tmp_path), "--costs", f"rtx3090-release,{cost}"], "two cost tables have the same name"),
        (["--traces", str(tmp_path), "--out", "/proc/nowhere/signals.md"], "/proc/nowhere"),
    ):
        assert signals.main([*flags, "--folds", "2"]) == 2
        assert said in capsys.readouterr().err
