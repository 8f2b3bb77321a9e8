"""Check that a decoder's tokens are the target's own greedy choices.

In exact arithmetic they always are. In floating point a kernel may round differently for one token than for several, so
below fp32 a choice may differ where the target's two best logits nearly tie. Such a place is reported with its gap, and
the comparison goes on from there: whatever follows must again be the plain greedy continuation of that prefix.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from speckv_online.modeling.introspection import text_config
from speckv_online.modeling.kv_cache import KVCache


@dataclass(slots=True)
class GreedyCheck:
    """Result of :func:`check_greedy`.

    Attributes
    ----------
    ties : list of (int, float)
        Positions in the answer where a token differs from plain greedy decoding, and how far its logit was below the
        best one.
    """

    ties: list[tuple[int, float]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """True if every token is plain greedy decoding's."""
        return not self.ties

    def within(self, epsilon: float) -> bool:
        """True if every difference is at a gap below ``epsilon`` (in logits)."""
        return all(gap < epsilon for _, gap in self.ties)


@torch.inference_mode()
def check_greedy(
    target: PreTrainedModel, prompt: list[int], tokens: list[int], eos: Collection[int] = ()
) -> GreedyCheck:
    """Compare ``tokens`` with plain greedy decoding of ``prompt``: the prompt in one forward, then one token a forward.

    Each token is compared with the plain choice *after the tokens before it*, so one tie does not count twice.
    """
    cache = KVCache(int(text_config(target).num_hidden_layers), len(prompt) + len(tokens) + 1)
    check = GreedyCheck()

    def forward(feed: list[int]) -> torch.Tensor:
        ids = torch.tensor([feed], device=target.device)
        return target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    for i, (feed, token) in enumerate(zip([prompt, *([t] for t in tokens)], tokens, strict=False)):
        logits = forward(feed)
        best = logits.max()
        if int(logits.argmax()) != token:
            check.ties.append((i, float(best - logits[token])))
        if token in eos and i + 1 < len(tokens):
            raise AssertionError(f"{len(tokens) - i - 1} tokens follow the end of sequence at position {i}")
    return check
