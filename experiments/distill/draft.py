"""The draft model: some layers of the target, its embedding, and an output head over the ids that it mostly uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
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


class _DistillationLoss(torch.autograd.Function):
    """The loss of :func:`distillation_loss` and its gradient, some positions at a time.

    As the head is frozen, the gradient of the states is all that backward needs. It is computed on the way in chunks
    that fit a processor's cache: whole logit matrices (positions x head) cost more to write and read than to multiply.
    """

    @staticmethod
    def forward(ctx, states, head, teacher, top, weight, argmax_weight, chunk):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(states)
        guesses = torch.empty_like(top)
        loss = states.new_zeros(())
        for part in torch.arange(len(states)).split(chunk):
            c = slice(int(part[0]), int(part[-1]) + 1)
            logits = states[c] @ head.T
            guesses[c] = logits.argmax(-1)
            logp = logits.log_softmax(-1)
            taught = (teacher[c] @ head.T).softmax(-1)
            known = torch.nonzero(top[c] >= 0)[:, 0]
            taught[known, top[c][known]] += argmax_weight
            mass = taught.sum(-1, keepdim=True)
            loss -= torch.linalg.vecdot(taught, logp) @ weight[c]
            gradient[c] = logp.exp_().mul_(mass).sub_(taught).mul_(weight[c, None]) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(guesses)
        return loss, guesses

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None, None, None


def distillation_loss(
    draft: Draft, states: torch.Tensor, batch: Batch, user_weight: float, argmax_weight: float, chunk: int = 256
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
    weight = torch.where(batch.answer, 1.0, user_weight)
    # In a user turn the ids are sampled, not the argmax: there the distribution alone teaches.
    top = torch.where(batch.answer, draft.index[batch.ids], -1)
    loss, guesses = _DistillationLoss.apply(
        states, draft.head, batch.teacher, top, weight / weight.sum(), argmax_weight, chunk
    )
    return loss, (guesses == top)[batch.answer]
