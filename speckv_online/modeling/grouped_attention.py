"""Attention with fewer key heads than query heads, without copies of the keys.

transformers gives each query head its own copy of keys and values whenever there is a mask, that is in every
verification. torch's kernel needs no copies on a CPU, and its answer has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name in a model's config.
GROUPED = "speckv_grouped"
#: Arguments of transformers' function that ours leaves to it.
_THEIRS = ("position_bias", "cache", "softcap", "s_aux")


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the heads' answers, shape (batch, length, heads, size), as transformers' ``sdpa`` function does.

    Parameters
    ----------
    module : Module
        The attention layer.
    query, key, value : Tensor
        Of shape (batch, heads, length, size), keys and values with fewer heads and more length.
    attention_mask : Tensor, optional
        True, or 0, where a query may look.
    dropout, scaling, kwargs
        As transformers has them.
    """
    if attention_mask is None or dropout or any(kwargs.get(name) is not None for name in _THEIRS):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    answers = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return answers.transpose(1, 2).contiguous(), None


def group(model: PreTrainedModel) -> bool:
    """Let a model use :func:`grouped_attention` where it uses ``sdpa`` now; return True if it does."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    if config._attn_implementation != "sdpa" or getattr(config, "num_key_value_heads", heads) in (None, heads):
        return False
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    model.set_attn_implementation(GROUPED)
    return bool(config._attn_implementation == GROUPED)
