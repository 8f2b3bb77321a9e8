"""What was found right is kept for the same model, and for no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speckv_online.cpu_engine import verdicts
from speckv_online.cpu_engine.verdicts import Verdicts
from tests.support.tiny_models import tiny_llama


def test_a_verdict_is_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    model = tiny_llama()
    small = Verdicts(model)
    small.keep("all")
    assert not small.known("all")  # checking a small one takes no time

    monkeypatch.setattr(verdicts, "LARGE_BYTES", 0)
    assert not Verdicts(model).known("all")
    Verdicts(model).keep("all")
    assert Verdicts(model).known("all")
    assert not Verdicts(model).known("another part")
    model.config.rms_norm_eps *= 2
    assert not Verdicts(model).known("all")
    model.config.rms_norm_eps /= 2
    assert Verdicts(model).known("all")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert not Verdicts(model).known("all")
