"""All settings of a distillation in one place; a run saves them beside its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Settings of one distillation.

    Attributes
    ----------
    pair : str
        Name of the model pair whose target teaches.
    kept_layers : tuple of int
        Layers of the target that the draft starts from, in order; the final norm comes along.
    head_size : int
        Ids that the draft can propose: the most frequent ones in the generated answers, and the special ones.
    answer_tokens : int
        Answer tokens to generate in all.
    generation_seed, seed : int
        Seed of the conversations; seed of the order of the batches.
    epochs : float
        Passes over the data, a fraction is allowed.
    batch_tokens : int
        Most tokens in a batch, padding included.
    lr, warmup, weight_decay, clip : float
        AdamW's peak rate, its warm-up as a share of all steps (a cosine to zero follows), decay, and the largest norm
        of a gradient.
    user_weight : float
        Weight of positions in the sampled user turns; answers weigh 1.
    argmax_weight : float
        Weight of the cross-entropy on the target's argmax beside the divergence from its distribution.
    holdout_every : int
        Every n-th conversation is kept for validation.
    """

    pair: str = "smollm2"
    kept_layers: tuple[int, ...] = (0, 1, 15, 29)
    head_size: int = 8192
    answer_tokens: int = 1_000_000
    generation_seed: int = 0
    seed: int = 0
    epochs: float = 2.0
    batch_tokens: int = 3072
    lr: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.05
    clip: float = 1.0
    user_weight: float = 0.3
    argmax_weight: float = 0.5
    holdout_every: int = 50

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self) | {"kept_layers": list(self.kept_layers)}
