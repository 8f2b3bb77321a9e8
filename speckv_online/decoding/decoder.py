"""The decoder that users meet: one sequence, several at once, or inside transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speckv_online.decoding.batch import decode_batch
from speckv_online.decoding.generation import Generation
from speckv_online.decoding.hf_generate import CallSignature, run
from speckv_online.decoding.loop import DecodingLoop


class SpeculativeDecoder(DecodingLoop):
    """Decodes with a target, a drafter and a policy.

    It decodes by itself (:meth:`generate`), or inside transformers: ``model.generate(**inputs,
    custom_generate=decoder)``, see :mod:`speckv_online.decoding.hf_generate`.

    Parameters
    ----------
    draft : Drafter, PreTrainedModel or None
        Proposes tokens; None allows only gamma 0.
    policy : Policy or str
        Sets gamma in every step; a string is a spec such as ``"online"`` or ``"fixed:4"``. It is wrapped in a fault
        guard: an exception or an impossible answer costs speed only.
    target : PreTrainedModel, optional
        Decoder-only model in eval mode. transformers' ``generate`` hands it over by itself.
    level : str, optional
        Name of the target's compression level, shown to the policy; by default read off the target.
    max_gamma : int
        Most tokens that any step drafts.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed only for ``stop_strings`` in transformers' ``generate``, where that is given none.
    remember : bool or str
        True keeps what the policy learns for later runs, see :mod:`speckv_online.learned.memory`; the policy is then
        given as a spec. One of your own needs a name: ``remember="NAME"``. By default nothing is written.

    Attributes
    ----------
    last : Generation or list of Generation
        What the latest call gave, with the record of every step; a list after a batch.
    totals : Totals
        Sums over all calls.
    memory : Memory or None
        Its ``save()`` writes at once what was learnt; by itself it writes every few seconds, and at the end.
    """

    __signature__ = CallSignature()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        stop_strings: str | list[str] | None = None,  # transformers hands on only what is named here
        tokenizer: PreTrainedTokenizerBase | None = None,
        task: str = "",
        **options: Any,
    ) -> Any:
        """Decode for transformers' ``generate(custom_generate=...)``."""
        return run(self, model, input_ids, stop_strings=stop_strings, tokenizer=tokenizer, task=task, **options)

    def decode_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[Generation]:
        """Continue up to 16 prompts at once; see :func:`speckv_online.decoding.batch.decode_batch`."""
        return decode_batch(self, prompts, max_new_tokens, **options)
