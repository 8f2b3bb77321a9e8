"""The training loop: AdamW with warm-up and a cosine, checkpoints without pickle, resumable at any of them."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from experiments.distill.data import ANSWER, USER, Conversations, epoch_batches, plan_batches, split
from experiments.distill.draft import Draft, distillation_loss
from experiments.distill.settings import Settings
from speckv_online.io.files import write_atomically

log = logging.getLogger(__name__)


def learning_rate(progress: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero, as a function of the share of the training that is done."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def save_checkpoint(
    path: Path, draft: Draft, optimizer: torch.optim.Optimizer | None = None, notes: dict[str, Any] | None = None
) -> None:
    """Write weights, the optimiser's moments and notes (as JSON in the metadata) to one file, atomically."""
    tensors = {"head_ids": draft.head_ids.to(torch.int32)}
    for name, p in draft.trained().items():
        tensors[name] = p.detach().contiguous()
        if optimizer is not None and p in optimizer.state:
            tensors["exp_avg." + name] = optimizer.state[p]["exp_avg"]
            tensors["exp_avg_sq." + name] = optimizer.state[p]["exp_avg_sq"]
    blob = save(tensors, {"notes": json.dumps(notes or {})})
    write_atomically(path, lambda f: f.write(blob), binary=True)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the notes of a checkpoint."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["notes"])  # noqa: SIM118


def _restore(optimizer: torch.optim.Optimizer, draft: Draft, tensors: dict[str, torch.Tensor], step: int) -> None:
    for name, p in draft.trained().items():
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors["exp_avg." + name].clone(),
            "exp_avg_sq": tensors["exp_avg_sq." + name].clone(),
        }


@torch.no_grad()
def validate(draft: Draft, data: Conversations, held: np.ndarray, prefix: list[int], settings: Settings) -> float:
    """Return the share of held-out answer positions where the draft has the target's id."""
    right = total = 0
    for batch in epoch_batches(data, held, prefix, settings.batch_tokens, (0,)):
        states = draft(batch.inputs).flatten(0, 1)[batch.where]
        _, hits = distillation_loss(draft, states, batch, settings.user_weight, settings.argmax_weight)
        right += int(hits.sum())
        total += len(hits)
    return right / max(1, total)


def train(
    draft: Draft,
    data: Conversations,
    prefix: list[int],
    settings: Settings,
    checkpoint: Path,
    *,
    shards: int = 0,
    init: str = "",
    max_seconds: float = math.inf,
    save_every: int = 100,
    validate_every: int = 100,
) -> dict[str, Any]:
    """Train ``draft`` in place and return the notes: steps, tokens seen, and a log of (step, loss, held-out accuracy).

    Parameters
    ----------
    draft : Draft
        Fresh, or with weights to go on from.
    data : Conversations
        Must be the same data when a checkpoint is resumed: ``shards`` is noted in it.
    init : str
        Where the weights of ``draft`` came from, for the notes; empty for the pruned layers.
    prefix : list of int
        Ids of the system turn that precedes every conversation.
    checkpoint : Path
        Written every ``save_every`` steps and at the end; if it exists, training goes on from it.
    max_seconds : float
        The schedule runs by steps or by time, whichever is further on, so that training ends within this time.
    """
    chosen, held = split(len(data), settings.holdout_every)
    lengths = data.lengths()[chosen]
    per_epoch = [
        len(plan_batches(lengths, settings.batch_tokens, len(prefix), np.random.default_rng([settings.seed, e])))
        for e in range(math.ceil(settings.epochs))
    ]
    total = round(sum(per_epoch) * settings.epochs / max(1, len(per_epoch)))
    optimizer = torch.optim.AdamW(
        draft.trained().values(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    notes: dict[str, Any] = {
        "settings": settings.as_dict(),
        "init": init,
        "shards": shards,
        "conversations": len(data),
        "answer_tokens": int((data.role == ANSWER).sum()),
        "user_tokens": int((data.role == USER).sum()),
        "step": 0,
        "total": total,
        "tokens": 0,
        "seconds": 0.0,
        "done": False,
        "log": [],
    }
    if checkpoint.exists():
        tensors, notes = load_checkpoint(checkpoint)
        draft.load_trained(tensors)
        if notes["step"]:
            _restore(optimizer, draft, tensors, notes["step"])
        total = notes["total"]
        if notes["done"]:
            log.info("this training is complete: move %s away to start another", checkpoint)
            return notes
        log.info("going on from step %d of %d", notes["step"], total)
    started = time.perf_counter() - notes["seconds"]
    first, running, done, step = notes["step"], 0.0, 0, 0
    opened, finished = time.perf_counter(), False
    for epoch, count in enumerate(per_epoch):
        if finished or step + count <= first:
            step += count
            continue
        for batch in epoch_batches(data, chosen, prefix, settings.batch_tokens, (settings.seed, epoch)):
            if step < first:
                step += 1
                continue
            for group in optimizer.param_groups:
                progress = max((step + 1) / total, (time.perf_counter() - started) / max_seconds)
                group["lr"] = learning_rate(min(progress, 1.0), settings)
            states = draft(batch.inputs).flatten(0, 1)[batch.where]
            loss, hits = distillation_loss(draft, states, batch, settings.user_weight, settings.argmax_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(draft.trained().values(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            done += batch.inputs.numel()
            notes |= {"step": step, "tokens": notes["tokens"] + batch.inputs.numel()}
            notes["seconds"] = time.perf_counter() - started
            running = 0.95 * running + 0.05 * loss.item() if running else loss.item()
            finished = notes["done"] = progress >= 1.0
            if step % 20 == 0:
                rate, right = done / (time.perf_counter() - opened), hits.float().mean()
                log.info(
                    "%.0f%% step %d loss %.3f accuracy %.3f %.0f tokens/s", 100 * progress, step, running, right, rate
                )
            if step % validate_every == 0 or finished:
                accuracy = validate(draft, data, held, prefix, settings)
                notes["log"].append((step, round(running, 4), round(accuracy, 4)))
                log.info("step %d: held-out accuracy %.4f", step, accuracy)
            if step % save_every == 0 or finished:
                save_checkpoint(checkpoint, draft, optimizer, notes)
            if finished:
                break
    return notes
