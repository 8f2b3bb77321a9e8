"""Records of the published release: where they are, and made-up ones in its columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: Where the published files are; the tests that read them are skipped without.
RELEASE = Path(os.environ.get("SPECKV_RELEASE", Path(__file__).parents[3] / "shared" / "speckv_release"))


def made_release(
    folder: Path,
    prompts: int = 3,
    levels: Sequence[str] = ("fp16", "nf4"),
    tasks: Sequence[str] = ("code", "chat"),
    gammas: Sequence[int] = (2, 4),
) -> tuple[Path, Path]:
    """Two small files like the release's: some levels, tasks and gammas, a timed run of each prompt."""
    rng = np.random.default_rng(0)
    steps, runs = [], []
    for level in levels:
        for gamma in gammas:
            for task in tasks:
                for number in range(prompts):
                    count, tokens = 12, 0
                    for step in range(count):
                        sure = float(rng.random())
                        n = int(rng.binomial(gamma, 0.2 + 0.7 * sure))
                        tokens += n + 1
                        signals = (4 - 4 * sure, sure, 5 - 4 * sure, sure / 2)
                        steps.append([level, gamma, task, step, n, n / gamma, n + 1, *(round(s, 4) for s in signals)])
                    seconds = count * (0.01 * gamma + (0.02 if level == "fp16" else 0.2))
                    runs.append(
                        [level, gamma, task, f"p{number}", tokens, seconds, tokens / seconds, 0.5, 1.0, 0.5, count]
                    )
    paths = folder / "a_step.csv", folder / "a_experiment.csv"
    heads = (
        "compression,gamma,task,step,accepted,acceptance_rate,tokens_produced,mean_draft_entropy,"
        "mean_draft_confidence,max_draft_entropy,min_draft_confidence",
        "compression,gamma,task,prompt,num_tokens,elapsed_sec,tokens_per_sec,mean_acceptance_rate,"
        "mean_draft_entropy,mean_draft_confidence,num_steps",
    )
    for path, head, rows in zip(paths, heads, (steps, runs), strict=True):
        path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return paths
