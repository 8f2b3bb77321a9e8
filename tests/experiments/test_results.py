"""The main comparison: its tables from files alone, and a real run beside transformers' own generation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.results.__main__ import main
from experiments.results.headline import headline
from experiments.results.model_check import modelled_calls
from experiments.results.stalls import without_stalls
from experiments.results.tables import Level, bars, document, draw, levels_of, table
from experiments.results.transformers_baseline import Schedule, Stock
from speckv_online.errors import UserError
from speckv_online.io.run_directory import StepWriter, Unit, UnitResult, read_manifest, read_units
from speckv_online.models.smollm2 import smollm2_ready
from speckv_online.reporting.plots import figure
from tests.support.calls import call, step
from tests.support.tiny_models import tiny_llama


@pytest.fixture
def level() -> Level:
    units = [
        call(policy, prompt, 10, seconds * scale, drafted)
        for prompt, scale in (("a", 1.0), ("b", 1.2), ("c", 0.8))
        for policy, seconds, drafted in (
            ("autoregressive", 1.0, 0),
            ("fixed:4", 2.0, 4),
            ("online", 0.8, 0),
            ("online+hybrid", 0.5, 2),
            ("transformers", 1.25, 0),
            ("transformers:constant-4", 2.5, 0),
        )
    ]
    return Level("fp16", [*units, call("fixed:1", "a", 10, 0.9, 1)])


def two_units() -> list[UnitResult]:
    """Calls of a level at which transformers is fastest with a draft."""
    seconds = {"autoregressive": 1.0, "transformers": 1.25, "transformers:heuristic": 0.5}
    return [call(policy, prompt, 10, s, 0) for prompt in "ab" for policy, s in seconds.items()]


def test_ratios_are_paired_and_hindsight_is_fair(level: Level) -> None:
    assert level.goodput("autoregressive") == pytest.approx(10.0)
    assert level.ratio("online", "autoregressive").value == pytest.approx(1.25)
    # fixed:1 decoded one prompt only: on that one it beats plain decoding, which is where they are compared.
    assert level.ratio("fixed:1", "autoregressive").value == pytest.approx(1 / 0.9)
    assert level.best("fixed") == "fixed:1"
    assert level.best("transformers") == "transformers"
    assert level.shared == ["a"]
    assert level.modelled_over_measured("online+hybrid") is None
    assert level.modelled_over_measured("transformers") is None


def test_tables_say_what_passes_and_what_fails(level: Level) -> None:
    lines = bars([level])
    product = next(line for line in lines if "the product over transformers' constant-4" in line)
    assert "5.000" in product
    assert "pass" in product
    best = next(line for line in lines if "`online` over the best fixed" in line)
    assert "1.125" in best
    level.calls["online"] = level.calls["fixed:4"]
    assert any("**fail**" in line for line in bars([level]))
    rows = table(level)
    assert sum("`transformers" in row for row in rows) == 3
    assert any(row.startswith("| `online+hybrid` | 3 | 20.00 |") for row in rows)
    text = headline([level], {"settings": {"max_new_tokens": 64}})
    assert "3 held-out prompts, 64 new tokens" in text
    assert "| transformers as it is, its best setting (*hindsight*: no draft) | 8.0 |" in text
    assert "| ours, best fixed γ (*hindsight*: 1) (1 of them) | 11.1 |" in text
    assert "| **ours, `online`** | **5.0** [0.50: 0.50–0.50] |" in text
    level.calls["fixed:1"] = level.calls["fixed:4"]
    other = Level("nf4", [replace(u, unit=replace(u.unit, level="nf4")) for u in two_units()])
    text = headline([level, other], {"settings": {"max_new_tokens": 64}})
    assert "2 held-out prompts, 64 new tokens" in text
    assert "its best setting (*hindsight*: no draft, heuristic) | 8.0 | 20.0 |" in text
    assert "| ours, no draft | 10.0 | 10.0 |" in text
    assert "`online`" not in text  # not in both levels
    assert "online" not in text  # not in this run


def timed(policy: str, prompt: str, length: int, drafts: list[int], extra: float = 0.0, dropped: int = 0) -> UnitResult:
    """A call whose seconds follow the cost model, but for ``extra``; in its last step tokens are ``dropped``."""
    steps, reads = [], True
    for i, k in enumerate(drafts):
        seconds = 0.030 + 0.006 * k + 0.00001 * (length + 2 * i)
        if k and reads:
            seconds, reads = seconds + 0.010 + 0.0001 * (length + 2 * i), False
        forwards = k + (dropped if i == len(drafts) - 1 else 0)
        seconds += 0.006 * (forwards - k)
        changed = {"context_length": length + 2 * i, "forwards": forwards, "draft_seconds": 0.006 * forwards}
        steps.append(replace(step(i, k, seconds), **changed))
    total = sum(s.seconds for s in steps) + 0.020 + 0.0005 * length + extra
    return UnitResult(Unit("fp16", policy, prompt, "chat", 0), steps, {"output": [0] * 9, "call_seconds": total})


def test_the_cost_model_predicts_calls_that_it_was_not_fitted_to() -> None:
    fixed = {"autoregressive": [0] * 9, "fixed:2": [2] * 5, "fixed:8": [8, 8, 2]}
    lengths = {"a": 50, "b": 90, "c": 140, "d": 60}
    units = [timed(name, p, n, drafts) for name, drafts in fixed.items() for p, n in lengths.items()]
    units += [timed("online", p, n, [0, 5, 1, 12, 0], dropped=2) for p, n in lengths.items()]
    units += [timed("online+hybrid", p, n, [1, 1]) for p, n in lengths.items()]
    measured = {(u.unit.policy, u.unit.prompt): u.facts["call_seconds"] for u in units}
    modelled = modelled_calls(units)
    assert set(modelled) == {*fixed, "online"}
    for name, calls in modelled.items():
        for prompt, seconds in calls.items():
            assert seconds == pytest.approx(measured[name, prompt], rel=1e-6)
    # A policy that is slow for reasons of its own, and a prompt that was, are not in the costs they are predicted by.
    slow = [
        timed("online", "a", 50, [0, 5, 1, 12, 0], extra=1.0, dropped=2),
        timed("fixed:2", "a", 50, [2] * 5, extra=1.0),
    ]
    again = modelled_calls([*slow, *(u for u in units if u.unit.prompt != "a" or u.unit.policy == "autoregressive")])
    assert again["online"]["a"] == pytest.approx(modelled["online"]["a"], rel=1e-6)
    assert again["fixed:2"]["a"] == pytest.approx(modelled["fixed:2"]["a"], rel=1e-6)
    # Nor are costs of prompts that a contender did not decode: the machine may have been another then.
    late = [timed(name, p, 70, drafts, extra=1.0) for name, drafts in fixed.items() for p in ("e", "f")]
    assert modelled_calls([*units, *late])["online"] == pytest.approx(modelled["online"], rel=1e-6)
    assert modelled_calls([u for u in units if u.unit.prompt == "a"]) == {}  # no other prompt to fit to
    rows = bars([Level("fp16", [*slow, *(u for u in units if u.unit.prompt != "a")])])
    assert any("modelled over measured goodput, fp16" in row and "**fail**" in row for row in rows)


def test_a_run_that_was_stopped_shows_the_same_prompts_at_all_levels(tmp_path: Path) -> None:
    done = {"fp16": ("a", "b", "c"), "nf4": ("a", "b")}
    for name, prompts in done.items():
        writer = StepWriter(tmp_path / f"steps-{name}.jsonl")
        for prompt in prompts:
            for policy in ("autoregressive", "fixed:4", "online")[: 2 if (name, prompt) == ("nf4", "b") else 3]:
                result = call(policy, prompt, 10, 1.0)
                writer.write(replace(result.unit, level=name), result.steps, result.facts)
        writer.close()
    levels = levels_of(tmp_path, ("autoregressive", "online"))
    assert [level.shared for level in levels] == [["a"], ["a"]]
    assert len(levels_of(tmp_path)[0].calls["online"]) == 3
    (alone,) = levels_of(tmp_path, ("autoregressive", "online"), ("fp16",))
    assert alone.shared == ["a", "b", "c"]
    with pytest.raises(UserError, match="no prompt yet"):
        levels_of(tmp_path, ("goodput",))


def test_calls_in_which_the_machine_stood_still_are_left_out_for_all_alike() -> None:
    units = [timed(name, p, 60, [0] * 9) for name in ("autoregressive", "online", "fixed:4") for p in "abcdef"]
    units += [call(name, p, 10, 1.0) for name in ("transformers:constant-4", "transformers") for p in "abcdef"]
    stalled = {("online", "b"), ("autoregressive", "d")}
    for u in units:
        if (u.unit.policy, u.unit.prompt) in stalled:
            u.steps[4] = replace(u.steps[4], seconds=1.0)
            u.facts["call_seconds"] += 1.0
    units[-1].facts["call_seconds"] = 9.0
    level = Level("fp16", units)
    assert sorted(level.calls["online"]) == list("acdef")
    assert sorted(level.calls["autoregressive"]) == list("abcef")
    assert sorted(level.calls["transformers"]) == list("abcde")
    assert level.shared == ["a", "c", "e"]
    assert level.ratio("online", "autoregressive").value == pytest.approx(1.0)
    assert level.ratio("online", "autoregressive", stalled=True).value == pytest.approx(1.0)  # one stall each
    assert "3 of 30 calls" in level.left_out
    assert "`online` on b (" in level.left_out
    text = document([level], {"settings": {}})
    assert "With them: `online` over autoregressive fp16 1.000." in text


def test_short_answers_of_transformers_are_no_stalls() -> None:
    """A call takes a while for its prompt, however few tokens follow."""
    lengths = (64, 64, 64, 2, 64, 40, 1, 64)
    units = [call("transformers", f"p{i}", n, 0.4 + 0.05 * n) for i, n in enumerate(lengths)]
    assert without_stalls(units) == (units, [])
    units[3].facts["call_seconds"] += 2.0
    units[4].facts["call_seconds"] += 9.0
    kept, left_out = without_stalls(units)
    assert [u for u, _ in left_out] == units[3:5]
    assert [times for _, times in left_out] == pytest.approx([2.5 / 0.5, 12.6 / 3.6])
    assert len(kept) == 6


def test_contenders_without_a_common_prompt_have_empty_cells() -> None:
    units = [call(name, p, 10, 1.0) for name in ("autoregressive", "online", "fixed:4", "online+hybrid") for p in "ab"]
    units += [call(name, "a", 10, 1.0) for name in ("transformers:constant-4", "transformers")]
    for u in units:
        if u.unit.policy.startswith("online") and u.unit.prompt == "a":
            u.steps[4] = replace(u.steps[4], seconds=5.0)
    level = Level("fp16", units)
    assert level.ratio("online", "transformers") is None
    assert level.ratio("autoregressive", "fixed:4", []) is None
    assert math.isnan(level.goodput("autoregressive", []))
    text = document([level], {"settings": {}})
    assert "| the product over transformers' constant-4, geometric mean | 1.4 | | |" in text
    assert "| `online` | 1 | 10.00 |  | 1.000 | 1.000 | 1.000 |  |  |" in text
    assert "| **ours, `online`** (1 of them) | **10.0** [1.00] |" in headline([level], {})
    del level.calls["autoregressive"]
    assert "| **ours, `online`** (1 of them) | **10.0** |" in headline([level], {})
    assert figure(draw, [Level("fp16", units)])
    # Prompts of the short table that a contender has none of are no request for all of its prompts.
    few = [call("fixed:1", p, 10, 1.0) for p in "bcde"] + [call("online", p, 10, 1.0) for p in "bcde"]
    few += [call(name, "a", 10, 1.0) for name in ("mlp16", "transformers:constant-4")]
    text = headline([Level("fp16", few)], {})
    assert "| ours, frozen MLP16 (0 of them) |  |" in text
    assert "| **ours, `online`** | **10.0** |" in text


def test_schedules_of_transformers_do_not_share_what_they_reach() -> None:
    stock = Stock.__new__(Stock)
    stock.target, stock.draft, stock.reached = tiny_llama(seed=1), tiny_llama(seed=1), {}
    two, four, grows = Schedule("", 2), Schedule("", 4), Schedule("", 5, "heuristic")
    for schedule in (two, four, grows, two, grows, four):
        stock.generate([5, 6, 7], 24, schedule)
    assert stock.reached[two] == 2
    assert stock.reached[four] == 4
    assert stock.reached[grows] > 5  # this draft is always right


def test_unknown_contenders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("transformers:magic", "unknown schedule"), ("nobody", "nobody"), ("online+x", "drafter")):
        assert main(["--leading", name, "--others", "autoregressive", "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert main(["--leading", "online", "--others", "fixed:4", "--out", str(tmp_path / "run")]) == 2
    assert "name no transformers" in capsys.readouterr().err
    (tmp_path / "doc.md").write_text("no markers")
    assert main(["--doc", str(tmp_path / "doc.md"), "--out", str(tmp_path / "run")]) == 2
    assert "lacks the lines" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_ready(), reason="the default pair is not prepared")
def test_real_run_is_lossless_and_goes_on_where_it_was(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text(
        "<!-- measured: begin -->\n<!-- measured: end -->\n<!-- headline: begin -->\n<!-- headline: end -->\n"
    )
    arguments = ["--levels", "fp16", "--some", "1", "--round", "1", "--max-new-tokens", "6", "--others", "fixed:1"]
    arguments += ["--threads", "1", "--out", str(tmp_path / "run"), "--doc", str(doc), "--readme", str(doc)]
    contenders = "transformers,transformers:constant-4,autoregressive,online+hybrid"
    assert main([*arguments, "--prompts", "1", "--leading", "transformers"]) == 0
    costs = read_manifest(tmp_path / "run")["levels"]
    assert main([*arguments, "--prompts", "2", "--leading", contenders]) == 0
    units = read_units(tmp_path / "run")
    names = contenders.split(",")
    assert sorted(u.unit.policy for u in units) == sorted([*names, *names, "fixed:1"])
    assert len({json.dumps(u.facts["output"]) for u in units}) == 2  # everybody says what the target says
    assert read_manifest(tmp_path / "run")["levels"] == costs  # calibrated once
    assert "`online+hybrid`" in doc.read_text()
    assert "| ours, no draft |" in doc.read_text()
