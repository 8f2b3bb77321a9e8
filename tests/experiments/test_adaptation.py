"""Learning against a frozen copy: what is left out, the answer in all its forms, on real models, and on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.adaptation.__main__ import main
from experiments.adaptation.cells import cells, pairs, scaled, setting
from experiments.adaptation.config import CONDITIONS, SAMPLE, AdaptationConfig
from experiments.adaptation.contest import FROZEN, Tally, settled
from experiments.adaptation.replay import learn
from experiments.adaptation.report import sentence, summarise
from experiments.adaptation.sample import pack, unpack
from policies.guards.fault import FaultGuard
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.simulator import Simulator
from speckv_online.stats import mean_gain
from tests.support.random_traces import random_trace, random_traces, save
from tests.support.tiny_models import TinyPair

ROOT = Path(__file__).parents[2]
COST = CostTable("test", {level: LevelCost(0.01, (0.05, 0.056), 0.001) for level in ("nf4", "int8")})
FEW = ["--steps", "60", "--tokens", "150", "--orders", "1"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Two pairs of traces to settle on and to adapt to, of other prompts, as the command takes them."""
    folders: dict[str, list[str]] = {"traces": [], "settled": []}
    for pair, ease in (("good", 3.0), ("weak", 0.5)):
        for first, kind in ((0, "traces"), (100, "settled")):
            made = [random_trace(first + i, level, task, 30, ease) for level in COST.levels
                    for task in ("chat", "code") for i in range(2)]  # fmt: skip
            folders[kind].append(f"{pair}={save(made, tmp_path / kind / pair)}")
    named = [text for kind, own in folders.items() for text in (f"--{kind}", ",".join(own))]
    return [*named, "--costs", str(COST.save(tmp_path / "cost.json")), "--out", str(tmp_path / "out")]


def config_of(flags: list[str]) -> AdaptationConfig:
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    traces, settled = (tuple(given[name].split(",")) for name in ("--traces", "--settled"))
    return AdaptationConfig(traces=traces, settled=settled, costs=(given["--costs"],))


def test_what_changes_was_met_by_no_copy_before(flags: list[str]) -> None:
    config = config_of(flags)
    todo = cells(config)
    assert list(dict.fromkeys(cell[0] for cell in todo)) == list(CONDITIONS)
    for cell in todo:
        key, pair, _, level, what = cell
        here = setting(config, cell)
        met, known = ({(t.prompt_id, t.level) for t in own} for own in (here.stream, here.source))
        assert not met & known
        assert {t.level for t in here.stream} == {level}
        if key == "level":
            assert level not in {t.level for t in here.source}
        if key == "task":
            assert {t.task for t in here.stream} == {what} != {t.task for t in here.source}
        if key == "draft":
            others = {id(t) for name, own in pairs(config)[1].items() if name != pair for t in own}
            assert {id(t) for t in here.source} <= others
        assert (here.told is here.true) == (key != "costs")
        assert bool(here.weights) == (key in ("level", "task", "draft"))


def test_scaled_costs_take_so_many_times_as_long() -> None:
    cost = CostTable("c", {"nf4": LevelCost(0.01, (0.05, 0.056), 0.001, 1e-5, 90, 20, 1e-4, 0.002)})
    for drafted in (0, 3, 16):
        before, after = (table.level("nf4").seconds(drafted, 120) for table in (cost, scaled(cost, 2.0)))
        assert after == pytest.approx(2 * before)
    assert scaled(cost, 2.0).level("nf4").weight == 20


def test_the_frozen_copy_is_the_settled_policy_and_stays_so() -> None:
    traces = random_traces(4, ("nf4", "int8"))
    copies = settled("online", 0, lambda policy: learn(policy, traces, COST, 0))
    states = {name: copies[name].state_dict() for name in ("", FROZEN)}
    assert states[""].keys() == states[FROZEN].keys()
    for key, value in states[""].items():
        np.testing.assert_array_equal(value, states[FROZEN][key], err_msg=key)
    for name, before in states.items():
        Simulator(FaultGuard(copies[name]), COST).run(random_traces(3))
        after = copies[name].state_dict()
        changed = {k for k in before if not np.array_equal(before[k], after[k]) and not k.startswith("safety")}
        assert bool(changed) == (name != FROZEN), changed


def test_a_tally_adds_up_by_prompt_and_part() -> None:
    tally = Tally(100)
    met = [("chat", "a"), ("code", "b"), ("chat", "a")]
    for _ in range(2):
        tally.add(met, [10, 20, 10], [40, 60, 40], {"": [1.0, 2.0, 4.0], FROZEN: [2.0, 4.0, 8.0]})
    found = tally.as_json()
    assert found["prompts"] == [("chat", "a"), ("code", "b")]
    assert found["repeated"] == 10 / 40
    parts = np.array(found["seconds"][""])
    assert parts.sum(axis=1).tolist() == [10.0, 4.0]
    assert (parts[0, 0], parts[1, 8], parts[0, -1]) == (2.0, 4.0, 8.0)  # after 0, 40 and 100 steps
    one = summarise({("unchanged", "pair", "costs", "nf4", ""): found})["unchanged"]
    assert [g.value for g in one.curves[FROZEN]] == pytest.approx([2.0] * 20)
    assert sentence({"unchanged": one}) == "Does learning pay? Times its frozen copy, yes: nothing changes 2.00."


def test_the_mean_gain_is_geometric_and_its_interval_over_prompts() -> None:
    rng = np.random.default_rng(0)
    ours = rng.uniform(1, 2, (2, 40, 3)).cumsum(axis=2)
    theirs = ours * np.array([4.0, 1.0])[:, None, None]
    exact = mean_gain(ours, theirs, ["x"] * 40)
    assert len(exact) == 3
    for g in exact:
        assert (g.value, g.low, g.high) == pytest.approx((2.0, 2.0, 2.0))
    noisy = mean_gain(ours, theirs * rng.uniform(0.5, 1.5, (2, 40, 1)), ["x"] * 40)
    assert all(g.low < g.value < g.high for g in noisy)
    # A cell that has met one stratum only: it is never left without a prompt.
    ours[0, 20:] = theirs[0, 20:] = 0.0
    assert mean_gain(ours, theirs, ["x"] * 20 + ["y"] * 20)[-1].low == pytest.approx(2.0)
    assert np.isnan(mean_gain(ours[:, :1], theirs[:, :1], ["x"])[0].low)


def test_packed_traces_are_the_same_but_for_rounded_signals(tmp_path: Path) -> None:
    made = {
        ("a", "met"): [random_trace(1), random_trace(2, "int8", "code", 17)],
        ("a", "known"): [random_trace(3, finish="eos")],
    }
    found = unpack(pack(made, tmp_path / "packed.npz"))
    assert found.keys() == made.keys()
    for before, after in ((x, y) for key in made for x, y in zip(made[key], found[key], strict=True)):
        after.check()
        for name in ("level", "task", "prompt_id", "split", "budget", "finish"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("prompt", "tokens", "drafts", "accepted"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
        np.testing.assert_allclose(before.signals, after.signals, rtol=1e-3, atol=1e-3)


def test_the_command_answers_in_words_json_and_a_picture(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, out = tmp_path / "page.md", tmp_path / "out"
    document.write_text("<!-- adaptation: begin -->\n<!-- adaptation: end -->\n")
    more = ["--conditions", "unchanged,level,draft,costs,long", *FEW, "--doc", str(document)]
    assert main([*flags, *more, "--json"]) == 0
    said = capsys.readouterr().out.strip()
    found = json.loads((out / "adaptation.json").read_text())
    assert json.loads(said) == found
    assert list(found) == ["unchanged", "level", "draft", "costs", "long"]
    for one in found.values():
        assert one["kind"] == "modelled"
        assert one["low"] <= one["ratio"] <= one["high"]
        assert set(one["over"]) == {"frozen", "mlp16", "cold"}
        assert one["curve"][-1]["ratio"] == one["ratio"]
        ratios = [cell["frozen"]["ratio"] for cell in one["cells"].values()]
        assert one["ratio"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert (out / "adaptation.png").stat().st_size > 1000
    assert "Does learning pay?" in document.read_text()
    card = json.loads(next(out.glob("weights/*/good-without-nf4/mlp16.json")).read_text())
    assert card["left_out"] == "good without nf4"
    assert card["levels"] == ["int8"]
    assert main([*flags, *more]) == 0  # all cells are there
    told = capsys.readouterr()
    assert "fitting" not in told.err
    assert "Does learning pay?" in told.out


def test_the_shipped_traces_hold_all_conditions() -> None:
    config = AdaptationConfig()
    todo = cells(config)
    assert {cell[0] for cell in todo} == set(CONDITIONS)
    assert all(setting(config, cell).stream for cell in todo)
    assert SAMPLE.stat().st_size < 500_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traces", "a=x"], "--traces and --settled go together"),
        (["--traces", "a=x", "--settled", "b=y"], "must name the pairs of --traces"),
        (["--traces", "a=x", "--settled", "a=y"], "--traces needs --costs"),
        (["--measured", "--quick"], "--measured decodes"),
        (["--conditions", "weather"], "--conditions must be of"),
        (["--orders", "0"], "must be at least 1"),
        (["--policy", "fixed:4"], "learn"),
        (["--doc", "nowhere.md"], "no document"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_real_models_take_turns(tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"{split}-{task}-{i}", "task": task, "split": split, "prompt": f"{task} {i}"}
            for split in ("train", "test") for task in ("chat", "code") for i in range(2)]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        "--prompt-file",
        str(tmp_path / "prompts.jsonl"),
        "--target",
        str(tiny_pair.target_dir),
        "--draft",
        str(tiny_pair.draft_dir),
        "--levels",
        "fp32",
    ]
    more += ["--max-new-tokens", "8", "--tokens", "40", "--threads", "1", "--device", "cpu"]
    more += ["--conditions", "unchanged,draft,long", "--out", str(tmp_path / "out")]
    assert main(["--measured", *more]) == 0
    found = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert {key: one["kind"] for key, one in found.items()} == dict.fromkeys(("unchanged", "draft", "long"), "measured")
    assert list(found["draft"]["cells"]) == ["smollm2, measured, fp32, ngram"]
    assert 40 <= found["long"]["end"] < 48
    assert "measured\n" in capsys.readouterr().out


@pytest.mark.ray
def test_cells_are_ray_tasks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.adaptation", "--ray", "--quick", "--conditions", "unchanged"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT, env=env, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Does learning pay?" in done.stdout
