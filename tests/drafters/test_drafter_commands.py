"""--drafter of speckv generate, experiments.profile and experiments.compare, on a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import __main__ as compare
from experiments.profile import __main__ as profile
from speckv_online.cli.app import main
from speckv_online.models.pairs import load_pair
from speckv_online.simulate.cost_table import load_cost
from speckv_online.traces.trace import load_traces
from tests.support.tiny_models import TinyPair

TEXT = "abcabcabc abcabc"
KINDS = ("model", "ngram", "hybrid", "hybrid:skip=0.5")


def models(pair: TinyPair, drafter: str) -> list[str]:
    draft = [] if drafter == "ngram" else ["--draft", str(pair.draft_dir)]
    return ["--target", str(pair.target_dir), *draft, "--drafter", drafter, "--device", "cpu", "--threads", "1"]


def test_generate_says_the_same_with_any_drafter(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for kind in KINDS:
        flags = ["--prompt", TEXT, "--policy", "fixed:4", "--max-new-tokens", "16", "--compression", "fp32", "--json"]
        assert main(["generate", *models(tiny_pair, kind), *flags]) == 0
        said[kind] = json.loads(capsys.readouterr().out)
    assert len({tuple(facts["token_ids"]) for facts in said.values()}) == 1
    assert sum(said["ngram"]["gamma_per_step"]) > 0
    assert said["ngram"]["models"]["draft"] == "ngram"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--drafter", "tree"], "unknown drafter"),
        (["--drafter", "ngram", "--draft", "x"], "leave --draft out"),
        (["--drafter", "hybrid"], "go together"),
        (["--drafter", "hybrid:gate=nowhere.npz", "--draft"], "nowhere.npz"),
    ],
)
def test_mistakes_are_one_line(
    tiny_pair: TinyPair, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags[-1] == "--draft":
        flags = [*flags, str(tiny_pair.draft_dir)]
    assert main(["generate", "--target", str(tiny_pair.target_dir), *flags, "--prompt", "x"]) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    if "--draft" not in flags:
        assert profile.main(["--target", str(tiny_pair.target_dir), *flags]) == 2
        assert compare.main(["--target", str(tiny_pair.target_dir), *flags]) == 2


@pytest.mark.parametrize("kind", ["ngram", "hybrid"])
def test_profile_traces_any_drafter(tiny_pair: TinyPair, tmp_path: Path, kind: str) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps({"id": "a", "task": "chat", "prompt": TEXT}) + "\n")
    flags = ["--levels", "fp32", "--prompts", str(prompts), "--max-new-tokens", "16", "--out", str(out)]
    assert profile.main([*models(tiny_pair, kind), *flags]) == 0
    (trace,) = load_traces(out)
    assert trace.meta["drafter"] == kind
    assert trace.reads == (kind == "hybrid")
    assert trace.available.any()
    assert (load_cost(out / "cost.json").level("fp32").draft_seconds > 0) == (kind == "hybrid")  # of a forward
    again = tmp_path / "again"
    assert profile.main([*models(tiny_pair, kind), *flags[:-1], str(again), "--reuse", str(out)]) == 0
    np.testing.assert_array_equal(load_traces(again)[0].drafts, trace.drafts)
    with pytest.MonkeyPatch.context() as patch:  # traces of another drafter are not mixed in
        patch.chdir(tmp_path)
        prompts.write_text(json.dumps({"id": "b", "task": "chat", "prompt": TEXT}) + "\n")
        assert profile.main([*models(tiny_pair, "model"), *flags]) == 2


def test_compare_needs_no_draft_with_the_ngram_drafter(tiny_pair: TinyPair, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text(json.dumps({"id": "a", "task": "chat", "prompt": TEXT}) + "\n")
    flags = ["--levels", "fp32", "--policies", "autoregressive,fixed:4", "--max-new-tokens", "12", "--local"]
    assert compare.main([*models(tiny_pair, "ngram"), *flags, "--prompts", str(prompts), "--out", str(out)]) == 0
    run = json.loads((out / "run.json").read_text())
    assert "ngram" in json.dumps(run)
    steps = [json.loads(line) for line in (out / "steps-fp32.jsonl").read_text().splitlines()]
    outputs = [row["output"] for row in steps if "output" in row]
    assert len(outputs) == 2
    assert outputs[0] == outputs[1]


def test_a_pair_without_a_draft(tiny_pair: TinyPair) -> None:
    pair = load_pair(target=str(tiny_pair.target_dir), level="fp32", device="cpu", drafter="ngram")
    assert pair.drafter.names == ("ngram",)
    assert not hasattr(pair.drafter, "model")
