"""Batches of 1, 4 and 16 prompts beside the same prompts one by one, and beside transformers' own batches."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.batch import BatchConfig, measure
from experiments.bench.gpu.models import FAMILIES, free, save_family
from experiments.bench.gpu.settings import Stage

SIZES = ("1", "4", "16")


def run(stage: Stage) -> None:
    """Measure size by size, the largest first: there a policy has the most to lose."""
    with tempfile.TemporaryDirectory() as name:
        models = save_family(FAMILIES[0], Path(name)) if stage.tiny else ()
        for size in reversed(SIZES):
            rows = stage.attempt(f"batches of {size}", partial(one_size, stage, size, models))
            for row in rows or ():
                stage.add("rows", row)
            free()


def one_size(stage: Stage, size: str, models: tuple[Path, ...]) -> list[dict[str, Any]]:
    """Return a row per policy at fp16."""
    target, draft = map(str, models) if models else (None, None)
    config = BatchConfig(
        target=target, draft=draft, policies=("autoregressive", "fixed:2", "online"), sizes=(size,), alone=True,
        levels=("fp16",),
        prompts=4 if stage.tiny else 16, max_new_tokens=6 if stage.tiny else 32, device=str(stage.device),
    )  # fmt: skip
    return measure(config)
