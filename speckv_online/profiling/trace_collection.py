"""Collecting exact traces: one generation of the target, and what the drafter proposes at its every position."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from policies.base import MAX_GAMMA, Policy
from policies.fixed import Fixed
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.io.step_records import StepRecord
from speckv_online.profiling.draft_table import draft_table
from speckv_online.traces.trace import Trace, agreement, prompt_hash


def collect_trace(
    target: PreTrainedModel,
    drafter: Drafter,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    level: str,
    policy: Policy | None = None,
    gamma: int = MAX_GAMMA,
    eos_ids: Collection[int] | None = None,
    task: str = "",
    prompt_id: str = "",
    split: str = "",
    meta: Mapping[str, Any] | None = None,
) -> tuple[Trace, list[StepRecord]]:
    """Generate greedily from a prompt and trace what the drafter would propose at every position.

    Parameters
    ----------
    target, drafter
        The pair. A drafter that learns cannot be traced: its drafts depend on what it has seen before.
    prompt : sequence of int
        Prompt tokens.
    max_new_tokens : int
        Budget of the generation.
    level : str
        Name of the target's compression level.
    policy : Policy, optional
        Decodes the output; it changes the time that this takes, not the output (but for near-ties of the target's
        logits that its kernels round differently at different widths). ``fixed:4`` by default.
    gamma : int
        Longest draft of the trace.
    eos_ids, task, prompt_id, split, meta
        As in :class:`~speckv_online.traces.Trace` and :meth:`~speckv_online.decoding.SpeculativeDecoder.generate`.

    Returns
    -------
    trace : Trace
    steps : list of StepRecord
        The timed steps of the generation, to fit a cost table to.
    """
    decoder = SpeculativeDecoder(drafter, policy=policy or Fixed(gamma=4), target=target, level=level)
    generation = decoder.generate(prompt, max_new_tokens, task=task, eos_ids=eos_ids)
    drafts, signals, lookups = draft_table(drafter, prompt, generation.tokens, gamma)
    tokens = np.array(generation.tokens, dtype=np.int32)
    eos = sorted(decoder.eos_ids if eos_ids is None else eos_ids)
    trace = Trace(
        level=level,
        task=task,
        prompt_id=prompt_id,
        split=split,
        prompt=np.array(prompt, dtype=np.int32),
        tokens=tokens,
        drafts=drafts,
        accepted=agreement(drafts, tokens),
        signals=signals,
        budget=min(max_new_tokens, decoder.room(len(prompt))),
        finish=generation.finish,
        meta=_about(drafter, prompt) | {"eos": eos} | dict(meta or {}),
        lookups=lookups,
    )
    return trace, generation.steps


def redraft(
    drafter: Drafter,
    trace: Trace,
    *,
    task: str,
    prompt_id: str,
    split: str,
    meta: Mapping[str, Any] | None = None,
) -> Trace:
    """Return the trace of another drafter over the output of an earlier trace: no target is needed."""
    drafts, signals, lookups = draft_table(drafter, trace.prompt.tolist(), trace.tokens.tolist(), trace.gamma)
    ends = {"eos": trace.meta["eos"]} if "eos" in trace.meta else {}
    return replace(
        trace,
        drafts=drafts,
        accepted=agreement(drafts, trace.tokens),
        signals=signals,
        lookups=lookups,
        task=task,
        prompt_id=prompt_id,
        split=split,
        meta=_about(drafter, trace.prompt.tolist()) | ends | dict(meta or {}),
    )


def _about(drafter: Drafter, prompt: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt_sha256": prompt_hash(prompt), "drafter": drafter.names[0]}
    return found | ({"lookup_weights": drafter.chances} if isinstance(drafter, ModelDrafter) else {})
