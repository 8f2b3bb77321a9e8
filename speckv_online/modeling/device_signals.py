"""What is known of a drafted token, found on the device that drafts it."""

from __future__ import annotations

import torch


def look_there(logits: torch.Tensor, head_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token and its signals for logits of shape (rows of the head,), fp32, without a transfer.

    Returns
    -------
    token : Tensor of int64, shape (1,)
        The likeliest token; ``head_ids`` are the tokens of the rows.
    found : Tensor of float32, shape (5,)
        The token (whole numbers below 2**24 are exact), the two largest logits, entropy in nats and confidence.
    """
    top, rows = logits.topk(2)
    # A slice, since indexing with a tensor of no dimension would wait for the device.
    token = rows[:1] if head_ids is None else head_ids[rows[:1]]
    p = logits.softmax(-1)
    return token, torch.stack((token[0].float(), top[0], top[1], torch.special.entr(p).sum(), p.amax()))
