"""What is known of a drafted token, found on the device that drafts it."""

from __future__ import annotations

import torch


def device_signals(logits: torch.Tensor, head_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token and its signals for logits of shape (rows of the head,), fp32, without a transfer.

    Returns
    -------
    token : Tensor of int64, shape (1,)
        The likeliest token; ``head_ids`` are the tokens of the rows.
    found : Tensor of float32, shape (5,)
        The token (whole numbers below 2**24 are exact), the two largest logits, entropy in nats and confidence.
    """
    top = logits.topk(2).values
    # The first of equals, as the target's choice is: topk makes no promise. A tensor of one dimension, since indexing
    # with one of none would wait for the device.
    row = logits.argmax(-1, keepdim=True)
    token = row if head_ids is None else head_ids[row]
    p = logits.softmax(-1)
    return token, torch.stack((token[0].float(), top[0], top[1], torch.special.entr(p).sum(), p.amax()))
