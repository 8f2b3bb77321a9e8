"""What a decoder makes of the policy and the draft that a user hands it, and what it refuses."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policies.base import Policy, PolicyError
from policies.guards.fault import FaultGuard
from policies.registry import make_policy
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.introspection import check_model, text_config
from speckv_online.models.pairs import check_tokenizers

#: Vocabularies of one tokenizer differ by padding only; more than this share of their size is another tokenizer.
MAX_PADDING = 0.05
#: What every drafter can do.
_DRAFTER = ("begin", "use", "draft", "lookup_confidence", "lookup_alternative", "end", "extend")


def token_ids(prompt: Any) -> list[int]:
    """Return a prompt's token ids as a list.

    Raises
    ------
    UserError
        If it is anything but one flat sequence of whole numbers.
    """
    if isinstance(prompt, str | bytes | Mapping):
        what = "a mapping: give its" if isinstance(prompt, Mapping) else "text: give tokenizer(text)'s"
        raise UserError(f"the prompt is {what} input_ids, a list of token ids")
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Iterable):
        raise UserError(f"the prompt must be a list of token ids, got {type(prompt).__name__}")
    tokens, found = list(prompt), list[int]()
    try:
        found += map(operator.index, tokens)
    except (TypeError, ValueError) as error:
        wrong = tokens[len(found)]
        if isinstance(wrong, Iterable) and not isinstance(wrong, str) and getattr(wrong, "ndim", 1) != 0:
            reason = "the prompt has two dimensions: give one list of token ids, or several to decode_batch"
        else:
            reason = f"token ids are whole numbers, and the prompt has {str(wrong)[:40]!r}: use a tokenizer's input_ids"
        raise UserError(reason) from error
    return found


def whole_number(max_new_tokens: Any) -> int:
    """Return a budget of tokens; raises :class:`UserError` if it is no whole number, or below zero."""
    try:
        number = operator.index(max_new_tokens)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"max_new_tokens must be a whole number, 0 or more, got {max_new_tokens!r}")
    return number


def as_policy(policy: Policy | str) -> FaultGuard:
    """Return a guarded policy; a string is a spec of :mod:`policies.registry`.

    Raises
    ------
    UserError
        If the spec names no policy.
    """
    if isinstance(policy, str):
        try:
            policy = make_policy(policy)
        except PolicyError as error:
            raise UserError(str(error)) from error
    if not isinstance(policy, Policy):
        got = f"the class {policy.__name__}: call it" if isinstance(policy, type) else f"{policy!r:.60}"
        raise UserError(f'the policy must be a Policy, or a spec such as "online" or "fixed:4", got {got}')
    return policy if isinstance(policy, FaultGuard) else FaultGuard(policy)


def as_drafter(draft: Drafter | PreTrainedModel | None, target: PreTrainedModel) -> Drafter | None:
    """Return the drafter that ``draft`` is, or that drafts with this model.

    Raises
    ------
    UserError
        If the model cannot draft for the target.
    """
    if isinstance(draft, str):
        raise UserError(f"the draft must be a loaded model or a drafter, not the name {draft!r}: load it first")
    check_uncompiled(draft, "draft")
    if not isinstance(draft, PreTrainedModel):
        if draft is not None and not all(callable(getattr(draft, name, None)) for name in _DRAFTER):
            raise UserError(f"the draft must be a loaded model, a drafter or None, got {type(draft).__name__}")
        return draft
    check_model(draft, "draft")
    check_vocabularies(target, draft)
    return ModelDrafter(draft, int(text_config(target).vocab_size))


def check_uncompiled(model: Any, role: str) -> None:
    """Raise :class:`UserError` for what ``torch.compile(model)`` returns: it is no model of transformers."""
    if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        raise UserError(
            f"the {role} was wrapped by torch.compile: give the model itself (model.compile() works in place)"
        )


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise :class:`UserError` if the two models' tokenizers are known, or seen from their sizes, to differ."""
    a, b = int(text_config(target).vocab_size), int(text_config(draft).vocab_size)
    if abs(a - b) > MAX_PADDING * max(a, b):
        raise UserError(
            f"target and draft have vocabularies of {a} and {b} tokens, more than padding apart: "
            "use a draft of the target's own family"
        )
    tokenizers = [known_tokenizer(model) for model in (target, draft)]
    if tokenizers[0] is not None and tokenizers[1] is not None:
        check_tokenizers(tokenizers[0], tokenizers[1])


def known_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside the model's weights on this machine, or None."""
    source = model.config._name_or_path
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception:  # a folder without a tokenizer fails in many ways, and each means that it is not known
        return None
