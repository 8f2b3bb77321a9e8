"""Acceptance of a draft on prompts that it was not distilled on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from experiments.distill.draft import Draft
from experiments.distill.ragged import RaggedLlama


@torch.inference_mode()
def greedy_answers(
    target: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: int
) -> list[list[int]]:
    """Return the target's greedy answers, all decoded side by side; an answer ends with ``eos`` or at the limit."""
    net = RaggedLlama(target, len(prompts), max(map(len, prompts)) + max_new_tokens)
    sequences = [list(p) for p in prompts]
    ends = [len(p) + max_new_tokens for p in prompts]
    position = 0
    while any(
        len(s) < end and not (s[-1] == eos and len(s) > len(p))
        for s, p, end in zip(sequences, prompts, ends, strict=True)
    ):
        tokens = torch.tensor([s[min(position, len(s) - 1)] for s in sequences])
        picks = net.logits(net.step(tokens, torch.full((len(prompts),), position))).argmax(-1).tolist()
        for s, p, end, pick in zip(sequences, prompts, ends, picks, strict=True):
            if position == len(s) - 1 and len(s) < end and not (s[-1] == eos and len(s) > len(p)):
                s.append(pick)
        position += 1
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


@torch.no_grad()
def matches(draft: Draft, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Return for each token of the answer whether it is the draft's argmax, given the tokens before it."""
    states = draft(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
    guesses = draft.head_ids[F.linear(states, draft.head).argmax(-1)]
    return (guesses == torch.tensor(list(answer))).numpy()


def accepted_and_tested(hits: np.ndarray, gamma: int) -> tuple[int, int]:
    """Count accepted and tested tokens of greedy decoding with a fixed ``gamma``.

    While a rollout agrees with the target, its context is the target's own output. So whether its next token is
    accepted is the teacher-forced match at that position, and no rollout has to be run.
    """
    accepted = labelled = at = 0
    while at < len(hits):
        drafted = hits[at : at + gamma]
        right = int(np.argmin(drafted)) if not drafted.all() else len(drafted)
        accepted += right
        labelled += min(right + 1, len(drafted))
        at += right + 1
    return accepted, labelled


def evaluate(
    draft: Draft,
    tasks: Sequence[str],
    ids: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    gamma: int = 4,
) -> dict[str, dict[str, Any]]:
    """Return per task of the prompts, and for all of them together, two measures of acceptance.

    ``teacher_forced`` is the share of answer positions where the draft's argmax is the target's token; accepted over
    tested counts only the positions that decoding with ``gamma`` would have tested.
    """
    sums: dict[str, np.ndarray] = {}
    for task, p, a in zip(tasks, ids, answers, strict=True):
        hits = matches(draft, p, a)
        counts = np.array([hits.sum(), len(hits), *accepted_and_tested(hits, gamma)])
        for key in (task, "all"):
            sums[key] = sums.get(key, 0) + counts
    return {
        key: {
            "teacher_forced": round(float(c[0] / c[1]), 4),
            f"accepted_over_tested_gamma_{gamma}": round(float(c[2] / c[3]), 4),
            "positions": int(c[1]),
            "tested": int(c[3]),
        }
        for key, c in sorted(sums.items())
    }
