"""Draw the training curve of a draft's card: ``python -m experiments.distill.plot CARD.json CURVE.png``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from speckv_online.console import run_command


def plot_card(card: Path, out: Path) -> None:
    """Plot loss and held-out accuracy over steps, from the log in a draft's card."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses, accuracies = zip(*json.loads(card.read_text())["training"]["log"], strict=True)
    figure, left = plt.subplots(figsize=(6, 3.2), dpi=100)
    left.plot(steps, losses, color="tab:gray")
    left.set(xlabel="step", ylabel="loss (running mean)")
    right = left.twinx()
    right.plot(steps, accuracies, color="tab:blue", marker="o", markersize=3)
    right.set_ylabel("top-1 agreement, held-out conversations", color="tab:blue")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.distill.plot", description=__doc__)
    parser.add_argument("card", type=Path, metavar="CARD.json")
    parser.add_argument("curve", type=Path, metavar="CURVE.png")
    arguments = parser.parse_args()
    sys.exit(run_command(parser.prog, lambda: plot_card(arguments.card, arguments.curve)))
