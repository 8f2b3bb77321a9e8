"""What a level costs in quality: measured against a reference, kept, and shown in reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.compare.__main__ import main as compare
from speckv_online.cli import main
from speckv_online.models.quality import known_quality, measure
from tests.support.engine import needs_engine
from tests.support.gguf_files import small_model, write_gguf
from tests.support.tiny_models import perturbed, tiny_llama


def test_a_model_against_itself_and_another() -> None:
    model, prompts = tiny_llama(), [list(range(1, 30)), list(range(300))]
    same = measure(model, model, "itself", [[t % 260 for t in prompt] for prompt in prompts])
    assert (same.agreement, same.kl_mean, same.positions) == (1.0, 0.0, 29 + 256)
    prompt = list(range(1, 30))
    other = perturbed(model, 0.5)
    found = measure(other, model, "another", [prompt])
    with torch.inference_mode():
        p, q = (m(input_ids=torch.tensor([prompt])).logits[0].softmax(-1).double() for m in (model, other))
    kl = (p * (p / q).log()).sum(-1)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert (found.kl_mean, found.kl_median) == pytest.approx((float(kl.mean()), float(kl.median())), rel=1e-3)
    assert found.agreement < 1.0


@needs_engine
def test_the_command_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    path = str(write_gguf(tmp_path / "small.gguf", small_model(), "Q4_0"))
    assert known_quality("smollm2", path, "q4_0") is None
    command = ["models", "quality", "--target", path, "--prompts", "2", "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)["q4_0"]
    assert facts["reference"] == "the de-quantized file"
    assert 0.8 < facts["agreement"] <= 1.0
    assert 0.0 < facts["kl_mean"] < 0.1
    monkeypatch.setattr("speckv_online.models.quality.measure", lambda *a: pytest.fail("measured again"))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["q4_0"] == facts
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "so it goes", "task": "chat"}\n')
    flags = ["--target", path, "--drafter", "ngram", "--levels", "q4_0", "--local", "--prompts", str(prompts)]
    more = ["--policies", "fixed:2", "--max-new-tokens", "6", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert compare([*flags, *more]) == 0
    assert (
        f"q4_0: {facts['agreement']:.1%} of next tokens are those of the de-quantized file" in capsys.readouterr().out
    )
    assert main(["models", "quality", "--levels", "q4_0"]) == 2
    assert "holds the level q4_1, not q4_0" in capsys.readouterr().err
