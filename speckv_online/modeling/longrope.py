"""Models whose rotary frequencies change where a sequence outgrows the length that they were pretrained with.

With "longrope" (Phi-3 and its kin) a forward takes the short or the long frequencies for *all* of its positions, by the
largest of them. A forward that verifies drafts on both sides of the switch would judge the ones before it with the
wrong frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from speckv_online.modeling.introspection import text_config
from speckv_online.modeling.kv_cache import KVCache

_NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class RopeSwitch:
    """Where a model's frequencies change.

    Attributes
    ----------
    at : int
        Longest sequence, in tokens, that is read with the short frequencies.
    rereads : bool
        Whether ``generate`` reads everything anew past it, as it does for Phi-3, or goes on with the cache.
    """

    at: int = _NEVER
    rereads: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> RopeSwitch:
        """Return the switch of a model."""
        config = text_config(model)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return cls()
        kind: Any = type(model)
        own = kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        return cls(int(rope["original_max_position_embeddings"]), own)

    def end(self, context_length: int) -> int:
        """Return the most tokens that context and drafts may have together in one forward."""
        return self.at if context_length <= self.at else _NEVER

    def restart(self, cache: KVCache, context_length: int) -> None:
        """Forget what was read with other frequencies than the coming forward's, where ``generate`` does."""
        if self.rereads and len(cache) <= self.at < context_length:
            cache.truncate(0)
