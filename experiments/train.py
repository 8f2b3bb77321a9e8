"""Train MLP16 from exact traces or step records, and write its weights with a card that says where they come from.

The weights are an ``.npz`` in the published layout (W1, b1, W2, b2) with the features' second moments beside it; the
card is a JSON file of the same name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.config import option, parse
from speckv_online.commands import run_command
from speckv_online.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``python -m experiments.train``."""

    traces: str = option("", "directory of traces, from python -m experiments.profile")
    records: str = option("", "CSV of step records instead of traces")
    split: str = option("train", "which split of the prompts to train on: train, test or all")
    features: str = option("causal", "causal (lagged signals) or step-mean (the step's own, as published)")
    levels: tuple[str, ...] = option((), "compression levels to train on, comma separated (default: all there are)")
    gammas: tuple[str, ...] = option(("1", "2", "4", "6", "8", "12", "16"), "gammas to label at each step of a trace")
    seeds: int = option(5, "starts from different initial weights; the best on held-out prompts is kept")
    holdout: int = option(25, "percentage of the prompts to hold out")
    epochs: int = option(200, "most passes over the data")
    seed: int = option(0, "seed of the split, the schedules and the first start")
    out: str = option("", "weight file (default: the weights that the policies ship with)")

    def __post_init__(self) -> None:
        if bool(self.traces) == bool(self.records):
            raise UserError("give either --traces DIRECTORY or --records FILE.csv")
        if self.features not in ("causal", "step-mean"):
            raise UserError(f"--features must be causal or step-mean, got {self.features!r}")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if not all(g.isdigit() and 1 <= int(g) <= 16 for g in self.gammas) or not self.gammas:
            raise UserError(f"--gammas must be whole numbers from 1 to 16, got {','.join(self.gammas)}")
        if self.seeds < 1 or self.epochs < 1 or not 1 <= self.holdout <= 90:
            raise UserError("--seeds and --epochs must be at least 1, --holdout from 1 to 90")
        if self.out and Path(self.out).suffix != ".npz":
            raise UserError(f"--out must end in .npz, got {self.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    description = (__doc__ or "").split("\n\n")[0]
    prog = "python -m experiments.train"
    return run_command("train", lambda: train(parse(TrainConfig, argv, prog, description)))


def train(config: TrainConfig) -> int:
    """Train and write weights and card."""
    import torch

    from policies.mlp16 import DEFAULT_WEIGHTS
    from speckv_online import manifest
    from speckv_online.files import write_atomically
    from speckv_online.rundir import save_arrays
    from speckv_online.training import train_mlp16

    data, source = load_data(config)
    torch.set_num_threads(1)  # batches this small only lose by being split over threads
    seeds = range(config.seed, config.seed + config.seeds)
    fit = train_mlp16(data, seeds=seeds, holdout=config.holdout / 100, split_seed=config.seed, epochs=config.epochs)
    out = Path(config.out) if config.out else DEFAULT_WEIGHTS
    gammas = sorted({int(g) for g in data.x[:, -1]})
    card = {
        "format": "speckv-mlp16-card",
        "version": 1,
        "made": manifest.now(),
        "features": config.features,
        "inputs": ["mean entropy", "mean confidence", "max entropy", "min confidence", "compression code", "gamma"],
        "target": "accepted / gamma",
        "levels": sorted({str(level) for level in data.level}),
        "gammas": gammas,
        "data": source | {"rows": len(data), "prompts": len(set(data.prompt.tolist())), "sha256": data.sha256()},
        "split": {"by": "prompt", "held_out_percent": config.holdout, "seed": config.seed},
        "held_out": fit.metrics | {"note": "these prompts also decided when training stopped"},
        "noise_var": fit.noise_var,
        "starts": fit.runs,
        "settings": {k: v for k, v in asdict(config).items() if k not in ("traces", "records", "out")},
        "software": manifest.software(),
        "git": manifest.git_state(),
    }
    save_arrays(out, fit.arrays(len(data)))
    write_atomically(out.with_suffix(".json"), lambda f: f.write(json.dumps(card, indent=1) + "\n"))
    m = fit.metrics
    print(
        f"{len(data)} rows; on {m['prompts']} held-out prompts: mean squared error {m['mse']:.4f} "
        f"(mean rate per level and gamma: {m['mse_of_mean_per_level_and_gamma']:.4f}), "
        f"correlation {m['correlation'] or 0:.3f}"
    )
    print(f"weights: {out}, card: {out.with_suffix('.json')}")
    return 0


def load_data(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """Return the training data and what the card says of their source."""
    from speckv_online.step_table import read_rows
    from speckv_online.traces import load_traces
    from speckv_online.training import data_from_rows, data_from_traces

    splits = () if config.split == "all" else (config.split, "")
    if config.records:
        rows = [r for r in read_rows(config.records) if not splits or r.split in splits]
        rows = [r for r in rows if not config.levels or r.compression in config.levels]
        return data_from_rows(rows, config.features), {"kind": "step records", "file": Path(config.records).name}
    traces = load_traces(config.traces, levels=config.levels, splits=splits)
    source: dict[str, Any] = {"kind": "exact traces", "traces": len(traces), "tokens": sum(len(t) for t in traces)}
    for key in ("target", "draft", "draft_fingerprint", "max_new_tokens"):
        source[key] = sorted({t.meta.get(key) for t in traces}, key=str)
    return data_from_traces(traces, config.features, [int(g) for g in config.gammas], config.seed), source


if __name__ == "__main__":
    sys.exit(main())
