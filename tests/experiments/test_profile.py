"""python -m experiments.profile on a tiny pair: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.profile.__main__ import main
from experiments.profile.collect import ProfileConfig, select_prompts, trace_path
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive
from speckv_online.io.run_directory import read_units
from speckv_online.simulate.cost_table import load_cost
from speckv_online.traces.trace import Trace, load_traces
from tests.support.tiny_models import TinyPair

PROMPTS = [
    {"id": "set/1", "task": "code", "prompt": "def add(a, b):", "split": "train"},
    {"id": "set_1", "task": "chat", "prompt": "Hello there", "split": "train"},
    {"id": "c", "task": "math", "prompt": "1 + 1 =", "split": "test"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


def arguments(pair: TinyPair, prompts: Path, out: Path, *more: str) -> list[str]:
    models = ["--target", str(pair.target_dir), "--draft", str(pair.draft_dir), "--device", "cpu", "--threads", "1"]
    return [*models, "--levels", "fp32", "--prompts", str(prompts), "--max-new-tokens", "20", "--out", str(out), *more]


def test_profile_writes_traces_and_costs(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out)) == 0
    said = capsys.readouterr()
    assert "fp32 2/2" in said.err
    assert "fp32: 2 traces" in said.out
    assert "clairvoyant" in said.out

    traces = load_traces(out)
    assert {(t.prompt_id, t.task, t.split) for t in traces} == {("set/1", "code", "train"), ("set_1", "chat", "train")}
    for trace in traces:
        text = next(p["prompt"] for p in PROMPTS if p["id"] == trace.prompt_id)
        assert trace.prompt.tolist() == tiny_pair.tokenizer(text).input_ids
        alone = tiny_pair.target.generate(
            input_ids=tiny_pair.tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=20, do_sample=False
        )[0]
        assert trace.tokens.tolist() == alone[len(trace.prompt) :].tolist()

    units = read_units(out)
    assert {u.unit.prompt for u in units} == {t.prompt_id for t in traces}
    cost = load_cost(out / "cost.json")
    assert cost.level("fp32").draft_seconds > 0
    assert str(tmp_path) not in (out / "cost.json").read_text()


def test_profile_goes_on_where_it_was(tiny_pair: TinyPair, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out)) == 0
    kept, lost = trace_path(out, "fp32", "set_1"), trace_path(out, "fp32", "set/1")
    before, stamp = Trace.load(lost), kept.stat().st_mtime_ns
    lost.unlink()
    assert main(arguments(tiny_pair, prompts, out, "--split", "all")) == 0
    assert kept.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(Trace.load(lost).drafts, before.drafts)
    assert {t.prompt_id for t in load_traces(out)} == {"set/1", "set_1", "c"}
    assert len(read_units(out)) == 3


def test_outputs_of_the_same_target_are_reused(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(tiny_pair, prompts, first, "--gammas", "0")) == 0
    assert not (first / "cost.json").exists()  # nothing was drafted, so drafting has no cost yet
    # Another draft: the target itself, which is always right.
    with_other = arguments(tiny_pair, prompts, second, "--reuse", str(first))
    with_other[with_other.index("--draft") + 1] = str(tiny_pair.target_dir)
    capsys.readouterr()
    assert main(with_other) == 0
    assert "output reused" in capsys.readouterr().err
    for old, new in zip(load_traces(first), load_traces(second), strict=True):
        np.testing.assert_array_equal(old.tokens, new.tokens)
        np.testing.assert_array_equal(new.accepted, np.minimum(16, np.arange(len(new), 0, -1)))
    assert not (second / "cost.json").exists()  # nothing was timed
    # Another budget is another output.
    other = arguments(tiny_pair, prompts, tmp_path / "third", "--reuse", str(first), "--max-new-tokens", "10")
    assert main(other) == 0
    assert "output reused" not in capsys.readouterr().err
    assert {len(t) for t in load_traces(tmp_path / "third")} == {10}


def test_other_models_are_not_mixed_in(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out, "--limit", "1")) == 0
    other = arguments(tiny_pair, prompts, out)
    other[other.index("--draft") + 1] = str(tiny_pair.target_dir)
    assert main(other) == 2
    assert "fp32 holds traces collected with draft 'draft', not 'target': give another --out" in capsys.readouterr().err
    # Another model of the same name is told by its weights.
    copied = shutil.copytree(tiny_pair.target_dir, tmp_path / "copied" / "draft")
    other[other.index("--draft") + 1] = str(copied)
    assert main(other) == 2
    assert "another draft_fingerprint" in capsys.readouterr().err
    assert len(load_traces(out)) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-new-tokens", "10"], "max_new_tokens 20, not 10"),
        (["--drafter", "hybrid"], "drafter 'model', not 'hybrid'"),
        (["--levels", "bf16", "--drafter", "hybrid"], "drafter 'model', not 'hybrid'"),
    ],
)
def test_other_settings_are_refused_also_where_nothing_is_missing(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out)) == 0
    assert main(arguments(tiny_pair, prompts, out, *more)) == 2
    assert said in capsys.readouterr().err
    assert {t.level for t in load_traces(out)} == {"fp32"}


def test_costs_say_where_they_were_measured(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that times nothing changes nothing but what it fits; too few steps give no costs at all."""
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out)) == 0
    before = load_cost(out / "cost.json")
    assert main(arguments(tiny_pair, prompts, out, "--threads", "2")) == 0
    assert load_cost(out / "cost.json") == before
    assert before.details["schedule"] == {"threads": 1}
    other = tmp_path / "other"
    assert main(arguments(tiny_pair, prompts, other, "--levels", "bf16")) == 0
    reused = arguments(tiny_pair, prompts, out, "--levels", "fp32,bf16", "--reuse", str(other), "--threads", "2")
    capsys.readouterr()
    assert main(reused) == 0
    assert capsys.readouterr().err.count("output reused") == 2
    assert load_cost(out / "cost.json") == before
    (out / "cost.json").write_text("{")  # damaged: made anew
    assert main(arguments(tiny_pair, prompts, out)) == 0
    assert load_cost(out / "cost.json").levels == before.levels
    few = arguments(tiny_pair, prompts, tmp_path / "few", "--max-new-tokens", "2", "--gammas", "16")
    assert main(few) == 0
    assert "fp32: too few timed steps for costs" in capsys.readouterr().err
    assert not (tmp_path / "few" / "cost.json").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--levels", "fp17"], "fp17"),
        (["--split", "dev"], "train, test or all"),
        (["--gammas", "1,17"], "from 0 to 16"),
        (["--gammas", "²"], "from 0 to 16"),
        (["--threads", "100000"], "at most 1024"),
        (["--prompts", "²"], "²"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--reuse", "nowhere"], "no such directory"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--target", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, more: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny_pair, prompts, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()
    assert reason in error[-1]
    assert not list(tmp_path.glob("out/**/*.npz"))


def test_two_processes_do_not_write_one_directory(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with exclusive(tmp_path):
        assert main(arguments(tiny_pair, prompts, tmp_path)) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_splits_are_kept_apart(prompts: Path) -> None:
    train, test = (select_prompts(ProfileConfig(prompts="12", split=s)) for s in ("train", "test"))
    assert len(train) == len(test) == 12
    assert not {p.id for p in train} & {p.id for p in test}
    assert {p.task for p in train} == {"code", "math", "chat", "summarization"}
    assert [p.id for p in select_prompts(ProfileConfig(prompts=str(prompts), split="test"))] == ["c"]
    unlabelled = prompts.with_name("only.jsonl")
    unlabelled.write_text(json.dumps(PROMPTS[2]) + "\n")
    with pytest.raises(UserError, match="no prompts of the split 'train'"):
        select_prompts(ProfileConfig(prompts=str(unlabelled)))


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_decoded(
    tiny_pair: TinyPair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "long", "task": "code", "prompt": "x" * 600}) + "\n")
    out = tmp_path / "out"
    assert main(arguments(tiny_pair, prompts, out)) == 2
    error = capsys.readouterr().err
    assert "prompt long has 600 tokens" in error
    assert "Loading weights" not in error  # no bars of libraries where nobody sees them move
    assert not list(out.rglob("*.npz"))


def test_a_level_of_no_draft_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draft-level", "nf4"]) == 2
    assert "--draft-level is that of --draft" in capsys.readouterr().err
