"""Caches of transformers: gone on from where a call of ``generate`` brings one, and handed over when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from speckv_online.decoding.loop import DecodingLoop
from speckv_online.errors import UserError
from speckv_online.modeling.introspection import text_config
from speckv_online.modeling.kv_cache import KVCache

#: Layers that keep what was read as it was read.
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a call.

    Attributes
    ----------
    ids, pads : list of int
        Its token ids, and the padding among the given ones before them.
    hidden : int
        Padding before everything that it consists of, a cache's tokens included.
    cached : int
        Tokens of it that the cache holds.
    unseen : int
        How many of those are not among its ids.
    """

    ids: list[int]
    pads: list[int]
    hidden: int = 0
    cached: int = 0
    unseen: int = 0


def given_cache(model_kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache that the caller of ``generate`` gave, not the one that ``generate`` makes; None without one.

    Raises
    ------
    UserError
        If it is of a kind that cannot be gone on from.
    """
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        return None
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UserError(f"past_key_values must be a DynamicCache or a StaticCache, got {type(cache).__name__}")
    if not getattr(cache, "_is_user_defined", int(cache.get_seq_length()) > 0):
        return None
    if other := sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _LAYERS}):
        raise UserError(f"a cache with {other[0]} cannot be gone on from: give a DynamicCache or a StaticCache")
    return cache


def split(
    input_ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None, config: GenerationConfig
) -> list[Prompt]:
    """Tell for each row what is padding, what a cache holds of it, and what is to be read.

    As in transformers, ids as long as the mask repeat what the cache holds, and shorter ones come after it.

    Raises
    ------
    UserError
        If the mask fits neither, or hides more than padding on the left.
    """
    rows, length = input_ids.shape
    held = 0 if cache is None else int(cache.get_seq_length())
    width = getattr(config, "_mask_length", None if held else length) if mask is None else mask.shape[-1]
    if width is None:  # no mask, and nothing known of one
        width = held + length
    if width not in (length, held + length) or (mask is not None and (mask.dim() != 2 or len(mask) != rows)):
        shape = f"({rows}, {length})" + (
            f" or, with the cache's {held} tokens, ({rows}, {held + length})" if held else ""
        )
        raise UserError(f"the attention mask must have the shape of input_ids, {shape}")
    before = width - length
    if held >= width:
        raise UserError(f"the cache holds {held} tokens, input_ids only {width}: give new tokens, or crop the cache")
    found = []
    seen = [[1] * width] * rows if mask is None else mask.tolist()
    for ids, visible in zip(input_ids.tolist(), seen, strict=True):
        hidden = visible.index(1) if 1 in visible else width
        if not all(visible[hidden:]):
            raise UserError("the attention mask hides tokens after the first visible one: pad prompts on the left")
        pads = max(hidden - before, 0)
        found.append(Prompt(ids[pads:], ids[:pads], hidden, max(held - hidden, 0), max(before - hidden, 0)))
    return found


def check_positions(positions: torch.Tensor | None, prompts: list[Prompt]) -> None:
    """Raise if positions were given (``generate`` prepares the usual ones itself) that do not count from zero."""
    if positions is None or positions.dim() != 2 or len(positions) != len(prompts):
        return
    for prompt, row in zip(prompts, positions.tolist(), strict=True):
        total = prompt.unseen + len(prompt.ids)
        given = len(row) - (prompt.hidden if len(row) == prompt.hidden + total else len(prompt.pads))
        if given in (total, len(prompt.ids)) and row[len(row) - given :] != list(range(total - given, total)):
            raise UserError("position_ids of your own are not supported: leave them to generate")


def load(decoder: DecodingLoop, cache: Cache | None, prompts: list[Prompt], budget: int) -> list[KVCache]:
    """Return a cache for each row that holds what the given one holds of it.

    Raises
    ------
    UserError
        If the given one does not fit the target, or the call.
    """
    target, longest = decoder.target, max(p.unseen + len(p.ids) for p in prompts)
    found = [KVCache(decoder.layers, p.unseen + len(p.ids) + budget + decoder.max_gamma + 1) for p in prompts]
    if cache is None:
        return found
    held = int(cache.get_seq_length())
    needed = max(p.hidden + p.unseen + len(p.ids) for p in prompts) + budget - 1
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if type(layer) is StaticLayer and layer.max_cache_len < needed:
            raise UserError(f"the static cache has room for {layer.max_cache_len} tokens, this call may need {needed}")
    if not held:
        return found
    if decoder.rope.rereads and held <= decoder.rope.at < longest + budget:
        raise UserError(f"past {decoder.rope.at} tokens this model reads everything anew: leave past_key_values out")
    config: Any = text_config(target)
    shape = (config.num_key_value_heads, config.head_dim) if hasattr(target, "_compiled") else None
    dtype = target.dtype if shape is None else torch.float32
    states: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for layer in layers:
        if not layer.is_initialized:
            states.append(None)
            continue
        if layer.keys.shape[0] != len(prompts) or len(layers) > decoder.layers:
            raise UserError(
                f"the cache is of {layer.keys.shape[0]} sequences and {len(layers)} layers, not of "
                f"{len(prompts)} and {decoder.layers} as the input and the target"
            )
        if shape is not None and (layer.keys.shape[1], layer.keys.shape[3]) != shape:
            raise UserError("the cache's heads are not the target's: it is another model's")
        # Offloaded states come back; those of a model on several devices stay where they are.
        where = layer.keys.device if layer.keys.device.type == target.device.type else target.device
        keys, values = (_whole(x.to(where, dtype), held) for x in (layer.keys, layer.values))
        states.append((keys, values))
    states += [None] * (decoder.layers - len(states))
    known = getattr(cache, "_token_ids", None)
    for i, (own, prompt) in enumerate(zip(found, prompts, strict=True)):
        start = held - prompt.cached
        own.fill([s and (s[0][i : i + 1, :, start:], s[1][i : i + 1, :, start:]) for s in states])
        own.given, own.unseen = prompt.cached, prompt.unseen
        if prompt.unseen and known is not None and len(known) == len(prompts) and len(known[i]) >= prompt.unseen:
            own.before = known[i][: prompt.unseen]
    return found


def _whole(states: torch.Tensor, held: int) -> torch.Tensor:
    """Return as many places as the cache holds tokens: a sliding window has lost the first, which nobody sees again."""
    have = states.shape[2]
    return states[:, :, :held] if have >= held else torch.nn.functional.pad(states, (0, 0, held - have, 0))


def hand_over(
    decoder: DecodingLoop,
    cache: Cache | None,
    own: list[KVCache],
    prompts: list[Prompt],
    answers: Sequence[list[int]],
    pad: int,
) -> Cache:
    """Append what was read to the given cache, or to a new one, as plain decoding leaves it; return it.

    Rows that ended before the longest one read padding after their end there, and so they do here.
    """
    target, longest = decoder.target, max(map(len, answers))
    for row, answer in zip(own, answers, strict=True):
        if missing := longest - len(answer):
            ids = torch.tensor([[answer[-1], *[pad] * (missing - 1)]], device=target.device)
            with torch.inference_mode():
                target(input_ids=ids, past_key_values=row, use_cache=True, logits_to_keep=1)
    held = 0 if cache is None else int(cache.get_seq_length())
    found = DynamicCache(config=text_config(target)) if cache is None else cache
    new = [row.states(prompt.cached) for row, prompt in zip(own, prompts, strict=True)]
    width = max(
        len(row) - prompt.cached + max(prompt.hidden - held, 0) for row, prompt in zip(own, prompts, strict=True)
    )
    for i, first in enumerate(new[0]):
        if first is not None:
            parts = [states[i] for states in new]
            keys, values = (torch.cat([_left(p[k], width) for p in parts if p is not None]) for k in (0, 1))
            found.update(keys, values, i)
    found._token_ids = [  # type: ignore[attr-defined]
        (row.before + p.ids + answer + [pad] * longest)[: len(row)] if len(row.before) == row.unseen else []
        for row, p, answer in zip(own, prompts, answers, strict=True)
    ]
    return found


def _left(states: torch.Tensor, width: int) -> torch.Tensor:
    """Return a copy with empty places in front, so that there are ``width``."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0)).clone()
