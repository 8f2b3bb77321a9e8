"""What an engine's steps take here, and what its drafts would be: for serving in the simulator.

Starts one vLLM server per method on loopback, draws the number of drafts at random, and drives it at several
concurrencies. Fits a cost table to its steps. Then records greedy outputs of the load experiment's prompts, with the
drafts of both methods at every position. Writes ``METHOD-DTYPE.json`` and ``METHOD-DTYPE/*.npz``. What is there already
is kept: a calibration that was stopped goes on, and to make one anew, its directory has to go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.config import launch, option
from experiments.load.config import NGRAMS, LoadConfig
from experiments.load.server import QUIET
from speckv_online.errors import UserError

EXPLORING = "experiments.load.exploring:Exploring"


@dataclass(frozen=True)
class CalibrateConfig(LoadConfig):
    """Settings of ``python -m experiments.load.calibrate``."""

    recorded: int = option(80, "prompts to record")
    out: str = option("runs/load-costs", "where tables and traces go")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(calibrate, CalibrateConfig, argv)


def calibrate(config: CalibrateConfig) -> int:
    """Calibrate all methods and dtypes."""
    from experiments.load.cell import play
    from experiments.load.server import interpreter
    from speckv_online.console import say
    from speckv_online.simulate.engine_costs import fit

    python, out = interpreter(config.python), Path(config.out).expanduser()
    for dtype in config.dtypes:
        for method in config.methods:
            name = f"{method}-{dtype}"
            if (out / f"{name}.json").is_file():
                continue
            steps = out / f"{name}.steps.jsonl"
            steps.parent.mkdir(parents=True, exist_ok=True)
            say(f"{name}: steps of other numbers of drafts")
            # A contender of its own, whose steps are noted; open loops add nothing.
            own = replace(config, contenders=(EXPLORING,), rates=(), repeats=1, out=str(out / "blocks"))
            play(own, method, dtype, steps=str(steps))
            rows = [json.loads(line) for line in steps.read_text().splitlines()]
            costs = fit(name, rows[10:])  # the first steps warm the engine up
            costs.save(out / f"{name}.json")
            say(
                f"{name}: {len(rows)} steps; {1e3 * costs.verify[0]:.1f} ms a token, {1e3 * costs.verify[15]:.1f} ms 16"
            )
        say(f"{dtype}: outputs, and drafts at every position")
        record(config, python, dtype, out)
    return 0


def record(config: CalibrateConfig, python: str, dtype: str, out: Path) -> None:
    """Save traces of vLLM's own outputs, with lookups as vLLM makes them, and with those of the draft model."""
    import numpy as np
    import torch

    from experiments.load.cell import in_turns, models_of
    from speckv_online.cpu_engine.start import start_engine
    from speckv_online.drafters.model import ModelDrafter
    from speckv_online.models.distilled_draft import load_shipped_draft
    from speckv_online.models.pairs import DEFAULT_PAIR, chat_prompt, load_tokenizer, prepare
    from speckv_online.profiling.draft_table import draft_table
    from speckv_online.traces.trace import NOTHING, Trace, agreement

    target, _ = models_of(config)
    tokenizer, prompts = load_tokenizer(str(target)), in_turns()[: config.recorded]
    ids, gamma = [chat_prompt(tokenizer, prompt.text) for prompt in prompts], 16
    asked: dict[str, Any] = {"model": str(target), "dtype": dtype, "prompts": ids, "gamma": gamma}
    asked |= {"min_ngram": NGRAMS[0], "max_ngram": NGRAMS[1]} | {
        "output_tokens": config.output_tokens,
        "out": str(out / f"{dtype}.outputs.json"),
    }
    surroundings: dict[str, str] = os.environ | QUIET | {"VLLM_CPU_KVCACHE_SPACE": str(config.gigabytes)}
    if not Path(asked["out"]).is_file():
        _decode(python, asked, surroundings)
    found = json.loads(Path(asked["out"]).read_text())
    # The same draft with a small head takes a tenth of the time. Nearly all of its tokens are those of the whole.
    draft, head_ids, _ = load_shipped_draft(prepare(DEFAULT_PAIR), torch.device("cpu"))
    start_engine(draft)
    model = ModelDrafter(draft, len(tokenizer), head_ids)
    for prompt, tokens_of, outputs in zip(prompts, ids, found, strict=False):
        tokens = np.array(outputs["tokens"], dtype=np.int32)
        if all((out / f"{method}-{dtype}" / f"{prompt.id}.npz").is_file() for method in ("ngram", "draft_model")):
            continue
        looked = np.full((len(tokens), gamma), NOTHING, dtype=np.int32)
        for row, proposed in zip(looked, outputs["lookups"], strict=True):
            row[: len(proposed)] = proposed
        drafts, signals, _ = draft_table(model, tokens_of, outputs["tokens"], gamma)
        for method, table, kind in (("ngram", looked, "ngram"), ("draft_model", drafts, "model")):
            Trace(
                level=dtype, task=prompt.task, prompt_id=prompt.id, split=prompt.split,
                prompt=np.array(tokens_of, dtype=np.int32), tokens=tokens, drafts=table,
                accepted=agreement(table, tokens), signals=signals if kind == "model" else np.zeros_like(signals),
                budget=config.output_tokens, finish="length", meta={"drafter": kind, "eos": []},
            ).save(out / f"{method}-{dtype}" / f"{prompt.id}.npz")  # fmt: skip


def _decode(python: str, asked: dict[str, Any], surroundings: dict[str, str]) -> None:
    """Have vLLM decode in a process of its own."""
    program = str(Path(__file__).with_name("record.py"))
    done = subprocess.run([python, program], input=json.dumps(asked), text=True, capture_output=True, env=surroundings)
    if done.returncode:
        raise UserError(f"vLLM did not decode: {(done.stderr.strip().splitlines() or ['no output'])[-1][-300:]}")


if __name__ == "__main__":
    sys.exit(main())
