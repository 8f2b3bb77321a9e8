"""Train the weights that policies start from, and write them with cards that say where they come from.

``mlp16.npz`` has MLP16 in the published layout (W1, b1, W2, b2) with the features' second moments; ``online.npz`` the
acceptance weights of token-level policies, which only exact traces can teach. Each card is a JSON file of the same
name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import launch, option
from speckv_online.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from speckv_online.traces.trace import Trace
    from speckv_online.training.mlp16 import Data


#: How many other choices of held-out prompts a card reports, and what of them.
SPLITS = 4
SCORES = ("mse", "mse_of_mean_per_level_and_gamma", "correlation")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``python -m experiments.train``."""

    traces: str = option("", "directory of traces, from python -m experiments.profile")
    more: tuple[str, ...] = option((), "directories of further traces, for the acceptance weights, comma separated")
    split: str = option("train", "which split of the prompts to train on: train, test or all")
    features: str = option(
        "causal", "inputs of MLP16: causal (lagged signals) or step-mean (the step's own, as published)"
    )
    levels: tuple[str, ...] = option((), "compression levels to train on, comma separated (default: all there are)")
    gammas: tuple[str, ...] = option(("1", "2", "4", "6", "8", "12", "16"), "gammas to label at each step of a trace")
    seeds: int = option(5, "starts from different initial weights; the best on held-out prompts is kept")
    holdout: int = option(25, "percentage of the prompts to hold out")
    epochs: int = option(200, "most passes over the data")
    seed: int = option(0, "seed of the split, the schedules and the first start")
    out: str = option("", "directory of the weights (default: where the policies look for theirs)")

    def __post_init__(self) -> None:
        if not self.traces:
            raise UserError("--traces DIRECTORY is missing: collect some with python -m experiments.profile")
        if self.features not in ("causal", "step-mean"):
            raise UserError(f"--features must be causal or step-mean, got {self.features!r}")
        if self.split not in ("train", "test", "all"):
            raise UserError(f"--split must be train, test or all, got {self.split!r}")
        if not all(g.isdecimal() and 1 <= int(g) <= 16 for g in self.gammas) or not self.gammas:
            raise UserError(f"--gammas must be whole numbers from 1 to 16, got {','.join(self.gammas)}")
        if self.seeds < 1 or self.epochs < 1 or not 1 <= self.holdout <= 90 or self.seed < 0:
            raise UserError("--seeds and --epochs must be at least 1, --holdout from 1 to 90 and --seed not negative")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return launch(train, TrainConfig, argv)


def train(config: TrainConfig) -> int:
    """Train and write weights and cards."""
    import torch

    from policies.acceptance.mlp16 import DEFAULT_WEIGHTS
    from speckv_online.io import manifest
    from speckv_online.io.run_directory import check_writable
    from speckv_online.traces.trace import load_traces
    from speckv_online.training.mlp16 import data_from_traces

    out = Path(config.out).expanduser() if config.out else DEFAULT_WEIGHTS.parent
    splits = () if config.split == "all" else (config.split, "")
    common: dict[str, Any] = {
        "made": manifest.now(),
        "split": {"by": "prompt", "held_out_percent": config.holdout, "seed": config.seed},
        "settings": {k: v for k, v in asdict(config).items() if k not in ("traces", "more", "out")},
        "software": manifest.software(),
        "git": manifest.git_state(),
    }
    torch.set_num_threads(1)  # batches this small only lose by being split over threads
    traces = load_traces(config.traces, levels=config.levels, splits=splits)
    check_writable(out)
    common["data"] = describe(traces)
    more = [trace for folder in config.more for trace in load_traces(folder, levels=config.levels, splits=splits)]
    data = data_from_traces(traces, config.features, [int(g) for g in config.gammas], config.seed)
    write_mlp16(config, out, data, common)
    write_acceptance(config, out, traces + more, common | {"data": describe(traces + more)})
    return 0


def write_mlp16(config: TrainConfig, out: Path, data: Data, common: dict[str, Any]) -> None:
    """Train MLP16 and write ``mlp16.npz`` and its card."""
    from speckv_online.training.mlp16 import train_mlp16

    seeds = range(config.seed, config.seed + config.seeds)
    how: dict[str, Any] = {"holdout": config.holdout / 100, "epochs": config.epochs}
    fit = train_mlp16(data, seeds=seeds, split_seed=config.seed, **how)
    # One choice of held-out prompts may be lucky: score the same training on a few more.
    more = range(seeds.stop, seeds.stop + min(SPLITS, config.seeds - 1))
    others = [train_mlp16(data, seeds=seeds[:1], split_seed=s, **how).metrics for s in more]
    card = common | {
        "format": "speckv-mlp16-card",
        "version": 1,
        "features": config.features,
        "inputs": ["mean entropy", "mean confidence", "max entropy", "min confidence", "compression code", "gamma"],
        "target": "accepted / gamma",
        "levels": sorted({str(level) for level in data.level}),
        "gammas": sorted({int(g) for g in data.x[:, -1]}),
        "held_out": fit.metrics | {"note": "these prompts also decided when training stopped"},
        "held_out_by_other_splits": [{name: m[name] for name in SCORES} for m in others],
        "noise_var": fit.noise_var,
        "starts": fit.runs,
    }
    card["data"] = card["data"] | {
        "rows": len(data),
        "prompts": len(set(data.prompt.tolist())),
        "sha256": data.sha256(),
    }
    write(out / "mlp16.npz", fit.arrays(len(data)), card)
    scores = {name: [m[name] or 0.0 for m in (fit.metrics, *others)] for name in SCORES}
    mse, plain, correlation = (" ".join(f"{v:.3f}" for v in scores[name]) for name in SCORES)
    print(f"MLP16: {len(data)} rows; on held-out prompts, by {1 + len(others)} splits: mean squared error {mse}")
    print(f"  (mean rate per level and gamma alone: {plain}), correlation {correlation}")


def write_acceptance(config: TrainConfig, out: Path, traces: list[Trace], common: dict[str, Any]) -> None:
    """Train the acceptance weights and write ``online.npz`` and its card."""
    from speckv_online.training.acceptance import evaluate_acceptance, tokens_from_traces, train_acceptance
    from speckv_online.training.mlp16 import split_by_prompt

    tokens = tokens_from_traces(traces, config.seed, out / "mlp16.npz")
    inside, outside = split_by_prompt(tokens.prompt, config.holdout / 100, config.seed)
    score = evaluate_acceptance(train_acceptance(tokens[inside]), tokens[outside])
    card = common | {
        "format": "speckv-acceptance-card",
        "version": 1,
        "levels": sorted({trace.level for trace in traces}),
        "held_out": score | {"note": "by weights trained on the other prompts; the weights written are trained on all"},
    }
    card["data"] = card["data"] | {"tokens_tested": len(tokens)}
    write(out / "online.npz", train_acceptance(tokens), card)
    before, after = score["before"], score["after"]
    print(
        f"acceptance: {len(tokens)} tested tokens; on {score['prompts']} held-out prompts: area under the ROC curve "
        f"{before['auc'] or 0:.3f} before a token is drafted, {after['auc'] or 0:.3f} after; log loss "
        f"{before['log_loss']:.3f} and {after['log_loss']:.3f} (mean rate: {score['log_loss_of_mean']:.3f})"
    )


def describe(traces: list[Trace]) -> dict[str, Any]:
    """Say in a card where traces come from."""
    source: dict[str, Any] = {"kind": "exact traces", "traces": len(traces), "tokens": sum(len(t) for t in traces)}
    for key in ("target", "draft", "draft_fingerprint", "max_new_tokens"):
        source[key] = sorted({bare(t.meta.get(key)) for t in traces}, key=str)
    return source


def bare(value: Any) -> Any:
    """Return a model's folder by its last part: a card that ships should not name directories of one machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write(path: Path, arrays: dict[str, np.ndarray], card: dict[str, Any]) -> None:
    """Write weights and their card."""
    from speckv_online.io.files import write_atomically
    from speckv_online.io.run_directory import save_arrays

    save_arrays(path, arrays)
    write_atomically(path.with_suffix(".json"), lambda f: f.write(json.dumps(card, indent=1) + "\n"))
    print(f"wrote {path} and its card")


if __name__ == "__main__":
    sys.exit(main())
