"""The hybrid drafter: token by token the better of the draft model's proposal and the n-gram lookup's."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import LOOKUP, NGRAM
from speckv_online.drafters.base import NO_PROPOSAL
from speckv_online.drafters.model import ModelDrafter
from speckv_online.lookup.gate import Gate, gate_features
from speckv_online.lookup.ngram_index import Proposal, write_signals
from speckv_online.modeling.forward_backend import CompiledForward


class HybridDrafter(ModelDrafter):
    """Drafts with a model and with a lookup of the context's own n-grams, whichever a gate thinks is right.

    Where both propose the same token, or the lookup has none, it is the model's. Where the lookup alone is sure enough,
    the model is not asked; its cache then lags, and catches up in one forward when it is needed. The signals are those
    of the proposal that was taken; the n-gram signal is the match length, negative if the lookup was overruled.

    A policy may choose in every step, and within one: ``hybrid``, ``model`` or ``ngram``, as of a
    :class:`~speckv_online.drafters.ModelDrafter`.

    In sampled decoding the gate sees the model's likeliest token. It chooses before anything is drawn, so that the draw
    is from the model's distribution, or the proposal is the lookup's one token: either way the output is the target's.

    Parameters
    ----------
    model, vocab_size, head_ids, quick
        As for :class:`~speckv_online.drafters.ModelDrafter`.
    gate : Gate, optional
        The one that ships by default.
    skip : float, optional
        How sure the lookup has to be for the model not to be asked, by default as the gate has it; 1 asks it always.
    """

    names: tuple[str, ...] = ("hybrid", "model", LOOKUP)

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        compiled: CompiledForward | None = None,
        *,
        gate: Gate | None = None,
        skip: float | None = None,
    ) -> None:
        super().__init__(model, vocab_size, head_ids, compiled)
        self.gate = gate or Gate.load()
        self.skip = self.gate.skip if skip is None else skip
        self.chances = self.gate.sure_weights

    def draft(self, signals: np.ndarray) -> int:
        """Propose one token; nothing if only the lookup may propose and has nothing."""
        found = self._found()
        if self.kind == LOOKUP or self.skips(found):
            return self._note(self._look_up(found, signals))
        token, logits = self.likeliest(signals)
        if self.kind == "model":
            token = self.settle(token, logits)
            signals[NGRAM] = 0.0 if found is None else found.length if found.token == token else -found.length
            return self._append(token)
        chosen = self.choose(found, token, signals)
        if chosen != token:
            self.proposals.append(None)
            return self._append(chosen)
        return self._append(self.settle(token, logits))

    def choose(self, found: Proposal | None, token: int, signals: np.ndarray) -> int:
        """Return the better of the lookup's and the model's proposals, and make the signals those of the chosen one.

        Parameters
        ----------
        found : Proposal or None
            The lookup's.
        token : int
            The model's likeliest token.
        signals : ndarray, shape (N_SIGNALS,)
            The model's signals; overwritten.
        """
        if found is None:
            signals[NGRAM] = 0.0
            return token
        sure = self.skips(found) > 0.0
        if found.token == token and not sure:
            signals[NGRAM] = found.length
        elif sure or self.gate.prefers_lookup(gate_features(found, signals)):
            write_signals(found, signals)
            return found.token
        else:
            signals[NGRAM] = -found.length
        return token

    def skips(self, found: Proposal | None) -> float:
        """Return how sure the gate is of a lookup where that is enough not to ask the model, else 0."""
        if found is None or self.skip >= 1.0 or self.kind == "model":
            return 0.0
        p = self.text_chances.of(found)
        return p if p >= self.skip else 0.0

    def lookup_confidence(self) -> float:
        """Return how likely the coming proposal is right if it is the lookup's alone, 0 if the model is asked."""
        return super().lookup_confidence() if self.kind == LOOKUP else self.skips(self._found())

    def lookup_alternative(self) -> float:
        """Return how likely the lookup is right where the model is to be asked all the same; 0 if it has nothing."""
        return 0.0 if self.skips(self._found()) else super().lookup_alternative()

    def _found(self) -> Proposal | None:
        """What the lookup proposes; it counts what this step drafted."""
        return self.ngrams.propose()

    def _append(self, token: int) -> int:
        self.drafted.append(token)
        return self._note(token)

    def _note(self, token: int) -> int:
        if token != NO_PROPOSAL:
            self.ngrams.push(token)
        return token

    def end(self, accepted: int) -> None:
        """Drop what belongs to this step's drafts."""
        super().end(accepted)
        self.ngrams.undo()
