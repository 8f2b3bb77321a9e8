"""Made-up traces whose signals tell something of their acceptance."""

from __future__ import annotations

import numpy as np

from speckv_online.traces.trace import Trace, agreement


def made_trace(prompt: int, level: str = "fp16", length: int = 40, task: str = "chat") -> Trace:
    """A trace whose prompts differ in how easy they are, and whose confidence gives that away."""
    rng = np.random.default_rng([prompt, len(level)])
    ease = 0.1 + 0.8 * (prompt % 10) / 9
    tokens = np.arange(1, length + 1, dtype=np.int32)
    wanted = np.append(tokens, np.full(16, -1, dtype=np.int32))
    right = rng.random((length, 16)) < ease
    drafts = np.stack([np.where(right[t], wanted[t : t + 16], -5) for t in range(length)]).astype(np.int32)
    signals = np.zeros((length, 16, 4), dtype=np.float32)
    signals[..., 1] = np.clip(ease + 0.1 * rng.standard_normal((length, 16)), 0.01, 0.99)
    signals[..., 0] = 4 * (1 - signals[..., 1])
    return Trace(
        level, task, f"p{prompt}", np.arange(8, dtype=np.int32), tokens, drafts, agreement(drafts, tokens), signals,
        length, "length", "train", {"draft": "made"},
    )  # fmt: skip
