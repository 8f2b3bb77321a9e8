"""The drift experiment: a stream that changes level, draft and tasks on tiny models, its alarms, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.drift.__main__ import main
from experiments.drift.config import Phase
from experiments.drift.report import find_alarms, write_drift
from experiments.drift.stage import first_layers
from speckv_online.errors import UserError
from speckv_online.io.files import exclusive
from speckv_online.io.run_directory import StepWriter, Unit, read_manifest, read_units
from tests.support.records import STEP
from tests.support.tiny_models import TinyPair, tiny_llama


@pytest.fixture
def flags(tiny_pair: TinyPair, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"{task}{i}", "task": task, "prompt": f"{task} {i}"} for task in ("chat", "code") for i in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "target": tiny_pair.target_dir, "draft": tiny_pair.draft_dir, "prompts": prompts, "per-phase": 2,
        "max-new-tokens": 10, "device": "cpu", "threads": 1, "policies": "autoregressive,fixed:2,online",
        "phases": "chat@fp32,code@fp32@layers:1,chat+code@fp16@ngram,chat@fp32", "out": tmp_path / "run",
    }  # fmt: skip
    return [x for key, value in values.items() for x in (f"--{key}", str(value))]


def test_a_stream_is_decoded_resumed_and_drawn(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, doc, image = tmp_path / "run", tmp_path / "page.md", tmp_path / "img" / "stream.png"
    before = "Between `<!-- drift: begin -->` and `<!-- drift: end -->`:\n<!-- drift: begin -->"
    doc.write_text(f"{before}<!-- drift: end -->\nAfter\n")
    assert main([*flags, "--doc", str(doc), "--plot", str(image)]) == 0
    page = doc.read_text()
    assert page.startswith(f"{before}\n") and page.endswith("\nAfter\n") and "(img/stream.png)" in page  # noqa: PT018
    assert image.read_bytes() == (run / "drift.png").read_bytes()
    units = read_units(run)
    assert len({u.unit.key for u in units}) == len(units) == 4 * 2 * 3
    outputs: dict[str, set[tuple[int, ...]]] = {}
    for u in units:
        outputs.setdefault(u.unit.prompt, set()).add(tuple(u.facts["output"]))
    assert all(len(same) == 1 for prompt, same in outputs.items() if not prompt.startswith("2."))  # fp32 is exact
    found = json.loads((run / "drift.json").read_text())
    assert [p["policy"] for p in found["policies"]] == ["autoregressive", "fixed:2", "online"]
    assert all(len(p["tokens_per_second"]) == 8 and len(p["phases"]) == 4 for p in found["policies"])
    assert set(found["policies"][0]["acceptance"]) == {None}
    for policy in found["policies"]:
        own = [u for u in units if u.unit.policy == policy["policy"]]
        assert policy["whole"]["value"] == pytest.approx(sum(u.tokens for u in own) / sum(u.seconds for u in own))
        assert policy["whole"]["prompts"] == 8
        for other, ratio in policy["over"].items():
            base = next(p for p in found["policies"] if p["policy"] == other)
            assert ratio["value"] == pytest.approx(policy["whole"]["value"] / base["whole"]["value"])
    assert "| whole stream | online |" in page
    assert "| 1 code@fp32@layers:1 | online |" in page
    assert (run / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert set(read_manifest(run)["workers"]) == {"fp32", "fp16"}
    assert "count" not in read_manifest(run)["prompts"]  # `speckv watch` would take it for that of each level
    table = capsys.readouterr().out

    # A kill in the last unit: what is left of it is cut off, and only it is decoded again.
    file = run / "steps-drift.jsonl"
    whole = file.read_text().splitlines()
    last = max(i for i, line in enumerate(whole[:-1]) if '"done"' in line) + 1
    file.write_text("\n".join(whole[: last + 1]) + "\n")
    assert main(["--resume", str(run)]) == 0
    resumed = read_units(run)
    assert [u.unit for u in resumed] == [u.unit for u in units]
    assert resumed[:-1] == units[:-1]
    assert capsys.readouterr().out.splitlines()[0] == table.splitlines()[0]
    assert set(read_manifest(run)["workers"]) == {"fp32", "fp16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code", "TASK"), ("code@fp16@layers:0", "layers:N"), ("code@fp16@what", "ngram"), ("@fp16", "TASK"),
        ("code@fp16@own@x", "TASK"),
    ],
)  # fmt: skip
def test_phases_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Phase.read(text)


def test_unknown_task_is_refused_before_models_load(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags[flags.index("--phases") + 1] = "poems@fp32"
    assert main(flags) == 2
    assert "no prompts of task poems: choose from chat, code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_first_layers_share_weights_and_leave_the_target_alone() -> None:
    target = tiny_llama(layers=3)
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        before = target(ids).logits
        small = first_layers(target, 1)
        short = small(ids).logits
        assert torch.equal(first_layers(target, 3)(ids).logits, before)
        assert torch.equal(target(ids).logits, before)
    assert not torch.allclose(short, before)
    assert small.lm_head.weight is target.lm_head.weight
    assert (small.config.num_hidden_layers, target.config.num_hidden_layers) == (1, 3)
    with pytest.raises(UserError, match="the target has 3 layers"):
        first_layers(target, 4)


def test_alarms_come_after_a_change_and_not_without_one() -> None:
    rng = np.random.default_rng(0)

    def prompts(rate: float, count: int) -> list[list]:
        return [[replace(STEP, accepted=int(rng.random() < rate), labelled=1) for _ in range(50)] for _ in range(count)]

    calm = prompts(0.7, 20)
    assert find_alarms(calm, [0] * 20, 10.0) == []
    alarms = find_alarms([*calm, *prompts(0.1, 10)], [0] * 20 + [1] * 10, 10.0)
    assert {a.detector for a in alarms} == {"ADWIN", "Page-Hinkley"}
    assert all(a.phase == 1 for a in alarms)
    assert all(1000 < a.step <= 1200 for a in {a.detector: a for a in reversed(alarms)}.values())
    idle = [[replace(STEP, drafted=0, accepted=0, labelled=0)] * 500]
    assert find_alarms(idle, [0], 10.0) == []


def test_a_finished_stream_stays_where_it_was_measured(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    assert main([*flags, "--phases", "chat@fp32", "--policies", "autoregressive"]) == 0
    there = read_manifest(run) | {"hardware": {"processor": "another"}, "git": {"commit": "0ld"}}
    assert there["prompts"]["count"] == 2
    (run / "run.json").write_text(json.dumps(there))
    assert main(["--resume", str(run)]) == 0
    assert read_manifest(run) | {"finished": ""} == there | {"finished": ""}
    settings = (run / "config.yaml").read_bytes()
    with exclusive(run):
        assert main(["--resume", str(run), "--threshold", "3"]) == 2
    assert (run / "config.yaml").read_bytes() == settings
    prompts.write_text(prompts.read_text().replace('"chat ', '"another '))
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    assert "holds a run with other settings (prompts_sha256)" in capsys.readouterr().err


def test_what_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path / "steps-drift.jsonl")
    writer.write(Unit("fp32", "fixed:2", "0.0:x", "chat", 0), [STEP])
    writer.close()
    write_drift(tmp_path, [Phase.read("chat@fp32")], 10.0)
    found = json.loads((tmp_path / "drift.json").read_text(), parse_constant=pytest.fail)
    assert found["policies"][0]["whole"]["low"] is None  # one prompt has no interval
