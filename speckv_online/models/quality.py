"""What a compression level costs in quality: how often, and how far, its next token's probabilities differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from speckv_online.errors import UserError
from speckv_online.io.files import write_atomically
from speckv_online.io.user_cache import cache_dir
from speckv_online.models.smollm2 import GGUF_SHA256

#: Most tokens of a prompt that are read.
LONGEST = 256
#: Version of the files in the cache.
_FORMAT = 1


@dataclass(frozen=True)
class Quality:
    """A level against a reference, over the positions of some prompts.

    Attributes
    ----------
    reference : str
        What it is compared with.
    positions : int
    agreement : float
        Share of positions at which the likeliest next token is the same.
    kl_mean, kl_median : float
        Kullback-Leibler divergence of the level's next token from the reference's, in nats.
    """

    reference: str
    positions: int
    agreement: float
    kl_mean: float
    kl_median: float

    def __str__(self) -> str:
        return (
            f"the next token of {self.reference} in {self.agreement:.1%} of {self.positions} positions, "
            f"KL {self.kl_mean:.2g} nats in the mean, {self.kl_median:.2g} in the median"
        )


@torch.inference_mode()
def measure(model: PreTrainedModel, reference: PreTrainedModel, name: str, prompts: Sequence[Sequence[int]]) -> Quality:
    """Compare a model with a reference, which has this name, at all positions of some prompts."""
    same, divergences = list[torch.Tensor](), list[torch.Tensor]()
    for prompt in prompts:
        ids = torch.tensor([list(prompt)[:LONGEST]])
        found, expected = (
            m(input_ids=ids.to(m.device)).logits[0].float().cpu().log_softmax(-1) for m in (model, reference)
        )
        same.append(found.argmax(-1) == expected.argmax(-1))
        divergences.append((expected.exp() * (expected - found)).sum(-1).clamp_min(0.0))
    if not same:
        raise UserError("there is no prompt to compare levels on")
    agree, kl = torch.cat(same), torch.cat(divergences)
    return Quality(name, len(agree), float(agree.float().mean()), float(kl.mean()), float(kl.median()))


def _file(pair: str, target: str | None, level: str) -> Path:
    """Return where the quality of a level is kept: by the weights, as far as that is quick to know."""
    weights: list[object] = [pair, GGUF_SHA256]
    if target is not None:
        path = Path(target).expanduser()
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        weights = [target, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    text = json.dumps([_FORMAT, weights, level])
    return cache_dir() / "quality" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def known_quality(pair: str, target: str | None, level: str) -> Quality | None:
    """Return the quality of a target's level as it was measured before, None if it was not."""
    try:
        return Quality(**json.loads(_file(pair, target, level).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep_quality(pair: str, target: str | None, level: str, quality: Quality) -> None:
    """Keep the quality of a target's level."""
    write_atomically(_file(pair, target, level), lambda file: file.write(json.dumps(asdict(quality))))
