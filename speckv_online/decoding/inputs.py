"""What a decoder makes of the policy and the draft that a user hands it, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policies.base import Policy, PolicyError
from policies.guards.fault import FaultGuard
from policies.registry import make_policy
from speckv_online.drafters.base import Drafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.introspection import check_model, text_config
from speckv_online.models.pairs import check_tokenizers

if TYPE_CHECKING:
    pass

#: Vocabularies of one tokenizer differ by padding only; more than this share of their size is another tokenizer.
MAX_PADDING = 0.05


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
    if not isinstance(draft, PreTrainedModel):
        return draft
    check_model(draft, "draft")
    check_vocabularies(target, draft)
    return ModelDrafter(draft, int(text_config(target).vocab_size))


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
