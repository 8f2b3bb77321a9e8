"""The draft model: some layers of the target, its embedding, and an output head over the ids that it mostly uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from experiments.distill.data import Batch


class Draft(nn.Module):
    """Layers and final norm of a pruned Llama; its tensors are named as in ``LlamaForCausalLM``.

    Parameters
    ----------
    target : LlamaForCausalLM
        Its embedding is shared, not copied, and stays frozen; the kept layers are copied.
    kept_layers : sequence of int
        Layers of the target to start from.
    head_ids : ndarray of int, shape (head,)
        Ids that the draft can propose, sorted.
    """

    def __init__(self, target: PreTrainedModel, kept_layers: Sequence[int], head_ids: np.ndarray) -> None:
        super().__init__()
        config = copy.deepcopy(target.config)
        config.num_hidden_layers = len(kept_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept_layers]
        with torch.device("meta"):
            self.model = LlamaModel(cast(LlamaConfig, config))
        source = target.model.state_dict()
        weights = {"embed_tokens.weight": source["embed_tokens.weight"], "norm.weight": source["norm.weight"].clone()}
        for new, old in enumerate(kept_layers):
            lead = f"layers.{old}."
            weights |= {f"layers.{new}." + k[len(lead) :]: v.clone() for k, v in source.items() if k.startswith(lead)}
        self.model.load_state_dict(weights, assign=True)
        self.model.rotary_emb = copy.deepcopy(target.model.rotary_emb)
        self.model.requires_grad_(True)
        self.model.embed_tokens.requires_grad_(False)
        self.kept_layers = tuple(kept_layers)
        self.head_ids = torch.from_numpy(head_ids.astype(np.int64))
        self.index = torch.full((config.vocab_size,), -1)  # id -> row of the head, or -1
        self.index[self.head_ids] = torch.arange(len(head_ids))
        self.head = target.lm_head.weight.detach()[self.head_ids].contiguous()  # (head, hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the final normed states, shape (rows, length, hidden)."""
        return self.model(ids, use_cache=False).last_hidden_state

    def trained(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, by their names in ``LlamaForCausalLM``."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy tensors of :meth:`trained` in; every one must be there."""
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(tensors[name])


class _SoftCrossEntropy(torch.autograd.Function):
    """``-sum_i w_i sum_v q_iv log softmax(logits_i)_v``; the gradient is computed on the way, a pass less each way."""

    @staticmethod
    def forward(ctx, logits, q, weight):  # type: ignore[no-untyped-def]
        logp = F.log_softmax(logits.float(), -1)
        loss = -torch.dot(weight, (q * logp).sum(-1))
        grad = logp.exp_().mul_(q.sum(-1, keepdim=True)).sub_(q).mul_(weight[:, None])
        ctx.save_for_backward(grad.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad.mul_(upstream), None, None


def distillation_loss(
    draft: Draft, states: torch.Tensor, batch: Batch, user_weight: float, argmax_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per weighted position, and for each position of an answer whether the draft has the target's id.

    The loss is the cross-entropy from the teacher's distribution over the head's ids (its divergence plus a constant),
    plus ``argmax_weight`` times that from its argmax. Both add up to one soft target. An argmax outside the head
    counts as missed, and only the first part teaches there.

    Parameters
    ----------
    states : Tensor, shape (positions, hidden)
        Final states of the draft at ``batch.where``.
    """
    with torch.no_grad():
        taught = F.linear(batch.teacher, draft.head).float()
        top = torch.where(batch.answer, draft.index[batch.ids], taught.argmax(-1))
        q = taught.softmax(-1)
        known = torch.nonzero(top >= 0)[:, 0]
        q[known, top[known]] += argmax_weight
        weight = torch.where(batch.answer, 1.0, user_weight)
    logits = F.linear(states, draft.head)
    loss = _SoftCrossEntropy.apply(logits, q, weight / weight.sum())
    return loss, (logits.detach().argmax(-1) == top)[batch.answer]
