"""What proposes tokens: a drafter holds one sequence and drafts one token at a time.

Here are the interface, the drafter with a draft model, and the one without, which looks the context's own n-grams up.
:mod:`speckv_online.drafters.hybrid` has the one that picks the better of the two.
"""

from __future__ import annotations

from typing import ClassVar, TypeGuard

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import LOOKUP, NGRAM
from speckv_online.drafters.base import NO_PROPOSAL, draft_signals, write_draft_signals
from speckv_online.lookup.gate import shipped_chances
from speckv_online.lookup.ngram_index import NgramIndex, Proposal, write_signals
from speckv_online.lookup.text_chances import TextChances
from speckv_online.modeling.device_signals import device_signals
from speckv_online.modeling.forward_backend import CompiledForward, ForwardBackend, backend_of
from speckv_online.modeling.introspection import embedded_of, longest_of, text_config
from speckv_online.modeling.kv_cache import KVCache
from speckv_online.modeling.sampling import Sampler


class ModelDrafter:
    """Drafts with a causal language model: its likeliest token, or in sampled decoding a draw from it.

    It offers lookups of the context's own n-grams in place of forwards: a policy may choose, in every step and within
    one, between ``model`` and ``ngram`` (which may have nothing to propose).

    The model's cache may lag behind the context (after steps that drafted nothing, and before the first draft of a
    sequence): the next draft feeds all missing tokens in one forward.

    Parameters
    ----------
    model : PreTrainedModel
        Decoder-only model in eval mode.
    vocab_size : int
        Size of the target's vocabulary: ids beyond it (padding of a larger embedding) are never proposed.
    head_ids : Tensor, shape (rows,), optional
        Where the model's head covers only some tokens: the token id of each of its rows.
    compiled : QuickForward, optional
        The model's quick form, which then reads and drafts in its place.

    Attributes
    ----------
    chances : list of float
        Weights of :func:`~speckv_online.lookup.gate.chance_of`: how likely a lookup is right.
    kind : str
        Which of ``names`` drafts until the step ends.
    """

    names: tuple[str, ...] = ("model", LOOKUP)

    #: Whether all proposals are the model's likeliest tokens or draws from it, unless the policy asks for lookups. It
    #: is not inherited, see :func:`is_pure`.
    pure: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        compiled: CompiledForward | None = None,
    ) -> None:
        self.model, self.vocab_size, self.compiled = model, vocab_size, compiled
        self.rows = vocab_size if head_ids is None else len(head_ids)
        self._head_ids = None if head_ids is None else head_ids.to(model.device)
        self.head_ids = None if head_ids is None else head_ids.tolist()
        self.refresh()
        self.chances, self.kind = shipped_chances(), self.names[0]

    def refresh(self) -> None:
        """Read what is to be known of the model: somebody may have changed it."""
        self.layers, self.max_length = int(text_config(self.model).num_hidden_layers), longest_of(self.model)
        embedded = embedded_of(self.model)
        #: Largest id that the model can read, where that is less than the target may say: others are read as it.
        self.last_id = embedded - 1 if embedded < self.vocab_size else None
        if self._head_ids is not None:
            self._head_ids = self._head_ids.to(self.model.device)

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence; nothing is fed to the model before the first draft."""
        self.sampler = sampler
        self.proposals: list[torch.Tensor | None] = []
        self.cache = KVCache(self.layers, capacity)
        self.context: list[int] = list(tokens)
        self.drafted: list[int] = []
        self.ngrams = NgramIndex(tokens)
        self.text_chances = TextChances(self.chances, sampler is not None)
        self.kind = self.names[0]

    @property
    def backend(self) -> ForwardBackend:
        """What runs the model: its quick form, or its own backend."""
        return backend_of(self.model) if self.compiled is None else self.compiled

    @property
    def lag(self) -> int:
        """Context tokens that the cache does not hold."""
        return len(self.context) - len(self.cache)

    def use(self, name: str) -> str:
        """Switch between the drafters of ``names`` until the step ends."""
        self.kind = name if name in self.names else self.names[0]
        return self.kind

    def draft_async(self, count: int) -> torch.Tensor:
        """Draft ``count`` tokens in greedy decoding without telling the host: for policies that need not see them.

        Returns
        -------
        Tensor, shape (count, 5), fp32, on the model's device
            Token, two best logits, entropy in nats and confidence of each draft, for :meth:`take_async`.
        """
        logits, rows = self.logits(), list[torch.Tensor]()
        while True:
            token, found = device_signals(logits, self._head_ids)
            rows.append(found)
            if len(rows) == count:
                break
            logits = self._head(self.backend.forward([], self.cache, 1, self.known(token)))
        return torch.stack(rows)

    def take_async(self, rows: list[list[float]], signals: np.ndarray) -> list[int]:
        """Take note of what :meth:`draft_async` drafted, now that it is on the host, and return the tokens."""
        tokens = [int(row[0]) for row in rows]
        for i, (_, *found) in enumerate(rows):
            write_draft_signals(found, signals[i])
            signals[i, NGRAM] = self.ngrams.signal(tokens[:i], tokens[i])
        self.drafted += tokens
        self.proposals += [None] * len(tokens)
        return tokens

    def known(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token ids with those that the model cannot read replaced by the largest that it can."""
        return ids if self.last_id is None else ids.clamp(max=self.last_id)

    def unread(self) -> list[int]:
        """Return the tokens of the context and of this step's drafts that the cache does not hold."""
        have, n = len(self.cache), len(self.context)
        return self.context[have:] + self.drafted if have < n else self.drafted[have - n :]

    def logits(self) -> torch.Tensor:
        """Feed what the cache lacks and return the next token's logits, shape (rows of the head,), in fp32."""
        missing = self.unread()
        last = self.last_id
        known = missing if last is None else [min(token, last) for token in missing]
        return self._head(self.backend.forward(known, self.cache, 1))

    def _head(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the last row of logits in fp32, without the padding of a larger embedding."""
        last = logits[-1]
        return (last if len(last) == self.rows else last[: self.rows]).float()

    def draft(self, signals: np.ndarray) -> int:
        """Draft one token; its signals are entropy (bits), confidence, margin (logits) and n-gram agreement."""
        if self.kind == LOOKUP:
            return self._look_up(self._found(), signals)
        token, logits = self.likeliest(signals)
        token = self.settle(token, logits)
        signals[NGRAM] = self.ngrams.signal(self.drafted, token)
        self.drafted.append(token)
        return token

    def _found(self) -> Proposal | None:
        """What the lookup proposes; it does not count what this step drafted."""
        return self.ngrams.propose(self.drafted)

    def _look_up(self, found: Proposal | None, signals: np.ndarray) -> int:
        """Draft the lookup's token, if it has one."""
        if found is None:
            return NO_PROPOSAL
        write_signals(found, signals)
        self.proposals.append(None)
        self.drafted.append(found.token)
        return found.token

    def lookup_confidence(self) -> float:
        """Return how likely the coming lookup is right, 0 where the model drafts, or there is none."""
        return self.text_chances.of(self._found()) if self.kind == LOOKUP else 0.0

    def lookup_alternative(self) -> float:
        """Return how likely a lookup in the model's place would be right; 0 if there is none."""
        return 0.0 if self.kind == LOOKUP else self.text_chances.of(self._found())

    def likeliest(self, signals: np.ndarray) -> tuple[int, torch.Tensor]:
        """Return the model's likeliest next token and its logits; write all signals but the n-gram's."""
        logits = self.logits()
        ((row, *found),) = self.draft_signals(logits[None])
        write_draft_signals(found, signals)
        return row if self.head_ids is None else self.head_ids[row], logits

    def draft_signals(self, logits: torch.Tensor) -> list[tuple[int, float, float, float, float]]:
        """Do what :func:`draft_signals` does, by the quick form's kernel if there is one."""
        return draft_signals(logits) if self.compiled is None else [self.compiled.draft_signals(row) for row in logits]

    def settle(self, token: int, logits: torch.Tensor) -> int:
        """Return the token to propose, the likeliest or a draw, and note the distribution that it was drawn from."""
        if self.sampler is None:
            self.proposals.append(None)
            return token
        return self._sample(logits, self.sampler)

    def _sample(self, logits: torch.Tensor, sampler: Sampler) -> int:
        """Draw a token from the draft's distribution, over the whole vocabulary."""
        token, proposal = self.propose(logits, sampler, self.context, self.drafted)
        self.proposals.append(proposal)
        return token

    def propose(
        self, logits: torch.Tensor, sampler: Sampler, context: list[int], drafted: list[int]
    ) -> tuple[int, torch.Tensor | None]:
        """Draw a token from the logits of the head's rows, after a context and drafts: see :meth:`Sampler.propose`."""
        if sampler.draft_needs_prefix:
            return sampler.propose(self._spread(logits, float("-inf")), [*context, *drafted])
        row, proposal = sampler.propose(logits, [])
        token = row if self.head_ids is None else self.head_ids[row]
        return token, None if proposal is None else self._spread(proposal, 0.0)

    def _spread(self, numbers: torch.Tensor, other: float) -> torch.Tensor:
        """Spread a number for each row of the head over the whole vocabulary, shape (vocab_size,)."""
        if self._head_ids is None and len(numbers) == self.vocab_size:
            return numbers
        if numbers.device.type == "cpu":  # with numpy, which wakes no threads
            spread = np.full(self.vocab_size, other, np.float32)
            spread[slice(len(numbers)) if self._head_ids is None else self._head_ids.numpy()] = numbers.numpy()
            return torch.from_numpy(spread)
        full = numbers.new_full((self.vocab_size,), other)
        where = torch.arange(len(numbers), device=numbers.device) if self._head_ids is None else self._head_ids
        return full.index_copy_(0, where, numbers)

    def end(self, accepted: int) -> None:
        """Drop the cache entries of rejected drafts."""
        self.cache.truncate(min(len(self.cache), len(self.context) + accepted))
        self.drafted, self.proposals = [], []
        self.kind = self.names[0]  # what the next step gets without asking

    def extend(self, tokens: list[int]) -> None:
        """Append settled tokens to the context."""
        self.context += tokens
        self.text_chances.extend(self.ngrams, tokens)


def is_pure(drafter: object) -> TypeGuard[ModelDrafter]:
    """Return True for a drafter whose proposals are its model's own; a class has to say so itself."""
    return isinstance(drafter, ModelDrafter) and bool(type(drafter).__dict__.get("pure"))
