"""Made-up traces: acceptance follows the confidence, as with a real draft."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, MAX_GAMMA, N_SIGNALS
from speckv_online.traces.trace import Trace, agreement

TASKS = ("chat", "code")


def random_trace(
    seed: int, level: str = "nf4", task: str = "chat", length: int = 40, ease: float = 1.0, finish: str = "length"
) -> Trace:
    """A trace whose draft tokens are right with a probability that is about their confidence."""
    rng = np.random.default_rng([seed, len(level), len(task)])
    confidence = rng.beta(1.5 * ease, 1.0, (length, MAX_GAMMA))
    tokens = np.arange(1, length + 1, dtype=np.int32)
    follow = np.append(tokens, np.full(MAX_GAMMA, -7, np.int32))[np.arange(length)[:, None] + np.arange(MAX_GAMMA)]
    drafts = np.where(rng.random((length, MAX_GAMMA)) < confidence, follow, 0).astype(np.int32)
    signals = np.zeros((length, MAX_GAMMA, N_SIGNALS), dtype=np.float32)
    signals[..., CONFIDENCE], signals[..., ENTROPY] = confidence, 5 * (1 - confidence)
    signals[..., MARGIN] = 8 * confidence
    budget = length + (5 if finish == "eos" else 0)
    trace = Trace(
        level, task, f"{task}-{seed}", np.arange(9, dtype=np.int32), tokens, drafts, agreement(drafts, tokens), signals,
        budget, finish, split="test",
    )  # fmt: skip
    trace.check()
    return trace


def random_traces(count: int, levels: tuple[str, ...] = ("nf4",), ease: float = 1.0) -> list[Trace]:
    """Some traces of every level, tasks in turn."""
    return [random_trace(i, level, TASKS[i % 2], 30 + i, ease) for level in levels for i in range(count)]


def save(traces: list[Trace], folder: Path) -> Path:
    """Write traces as the collector does."""
    for trace in traces:
        (folder / trace.level).mkdir(parents=True, exist_ok=True)
        trace.save(folder / trace.level / f"{trace.prompt_id}.npz")
    return folder
