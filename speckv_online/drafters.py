"""What proposes tokens: a drafter holds one sequence and drafts one token at a time.

Here are the interface, the drafter with a draft model, and the one without, which looks the context's own n-grams up.
:mod:`speckv_online.hybrid` has the one that picks the better of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from policies.base import CONFIDENCE, ENTROPY, LOOKUP, MARGIN, NGRAM
from speckv_online.gate import chance_of, shipped_chances
from speckv_online.kvcache import KVCache
from speckv_online.ngram import NgramIndex, Proposal, write_signals
from speckv_online.quick_draft import QuickDraft
from speckv_online.sampling import Sampler

#: What :meth:`Drafter.draft` returns where it has nothing to propose: the step drafts no further.
NO_PROPOSAL = -1
#: Entropy in bits of a draft that knows nothing.
CLUELESS = 10.0


class Drafter(Protocol):
    """Interface of a drafter: ``begin``, then in each step ``draft`` as often as wanted, ``end`` and ``extend``."""

    #: Most tokens (context and drafts together) that the drafter can hold.
    max_length: int
    #: What a policy may ask for by ``Decision.drafter``; the first is what it gets without asking.
    names: tuple[str, ...]

    @property
    def lag(self) -> int:
        """Context tokens that the drafter has not read yet; at least 1, the latest, when a step begins."""

    #: For each draft of the step the distribution that it was drawn from, shape (vocab,); None for a deterministic one.
    proposals: list[torch.Tensor | None]

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence with these context tokens, which may grow to about ``capacity``; draw with ``sampler``."""

    def use(self, name: str) -> str:
        """Draft what comes of the step as the drafter of this name, by default the first; return the name."""

    def draft(self, signals: np.ndarray) -> int:
        """Propose the token after the context and this step's drafts, or :data:`NO_PROPOSAL`.

        Writes the proposal's (N_SIGNALS,) signals. In greedy decoding a proposal depends on the tokens before it alone
        (exact traces rest on that, unless a drafter learns).
        """

    def sure(self) -> float:
        """Return how likely the coming proposal is right where it takes no forward of a model, 0 where it does."""

    def offer(self) -> float:
        """Return how likely a lookup is right that could be had, as the drafter ``ngram``, in place of a forward."""

    def end(self, accepted: int) -> None:
        """Forget this step's drafts, of which the first ``accepted`` are about to be confirmed by ``extend``."""

    def extend(self, tokens: list[int]) -> None:
        """Append tokens that the target settled on to the context."""


class ModelDrafter:
    """Drafts with a causal language model: its likeliest token, or in sampled decoding a draw from it.

    In greedy decoding it offers lookups of the context's own n-grams in place of forwards: a policy may choose, in
    every step and within one, between ``model`` and ``ngram`` (which may have nothing to propose).

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
    quick : QuickDraft, optional
        The model's quick form, which then reads and drafts in its place; batches take the model itself.

    Attributes
    ----------
    chances : list of float
        Weights of :func:`~speckv_online.gate.chance_of`: how likely a lookup is right.
    kind : str
        Which of ``names`` drafts until the step ends.
    """

    names: tuple[str, ...] = ("model", LOOKUP)

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        head_ids: torch.Tensor | None = None,
        quick: QuickDraft | None = None,
    ) -> None:
        self.model, self.vocab_size, self.quick = model, vocab_size, quick
        self.rows = vocab_size if head_ids is None else len(head_ids)
        self._head_ids = None if head_ids is None else head_ids.to(model.device)
        self.head_ids = None if head_ids is None else head_ids.tolist()
        config = model.config.get_text_config(decoder=True)
        self.layers = int(config.num_hidden_layers)
        self.max_length = int(getattr(config, "max_position_embeddings", 1 << 30))
        embedded = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        #: Largest id that the model can read, where that is less than the target may say: others are read as it.
        self.last_id = embedded - 1 if embedded < vocab_size else None
        self.chances, self.kind = shipped_chances(), self.names[0]

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence; nothing is fed to the model before the first draft."""
        self.sampler = sampler
        self.proposals: list[torch.Tensor | None] = []
        self.cache = KVCache(self.layers, capacity)
        self.context: list[int] = list(tokens)
        self.drafted: list[int] = []
        self.ngrams = NgramIndex(tokens)
        self.kind = self.names[0]

    @property
    def lag(self) -> int:
        """Context tokens that the cache does not hold."""
        return len(self.context) - len(self.cache)

    def use(self, name: str) -> str:
        """Switch between the drafters of ``names`` until the step ends."""
        self.kind = name if name in self.names else self.names[0]
        return self.kind

    def ahead(self, count: int) -> torch.Tensor:
        """Draft ``count`` tokens in greedy decoding without telling the host: for policies that need not see them.

        Returns
        -------
        Tensor, shape (count, 5), fp32, on the model's device
            Token, two best logits, entropy in nats and confidence of each draft, for :meth:`take_ahead`.
        """
        logits, found = self.logits(), list[torch.Tensor]()
        while True:
            top, rows = logits.topk(2)
            # A slice, since indexing with a tensor of no dimension would wait for the device.
            token = rows[0] if self._head_ids is None else self._head_ids[rows[:1]][0]
            p = logits.softmax(-1)
            found.append(torch.stack((token.float(), top[0], top[1], torch.special.entr(p).sum(), p.amax())))
            if len(found) == count:
                break
            logits = self._read(token.view(1))
        return torch.stack(found)

    def take_ahead(self, rows: list[list[float]], signals: np.ndarray) -> list[int]:
        """Take note of what :meth:`ahead` drafted, now that it is on the host, and return the tokens."""
        tokens = [int(row[0]) for row in rows]  # whole numbers below 2**24 are exact in fp32
        for i, (_, *found) in enumerate(rows):
            write_looked(found, signals[i])
            signals[i, NGRAM] = self.ngrams.signal(tokens[:i], tokens[i])
        self.drafted += tokens
        self.proposals += [None] * len(tokens)
        return tokens

    def known(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token ids with those that the model cannot read replaced by the largest that it can."""
        return ids if self.last_id is None else ids.clamp(max=self.last_id)

    def logits(self) -> torch.Tensor:
        """Feed what the cache lacks and return the next token's logits, shape (rows of the head,), in fp32."""
        have, n = len(self.cache), len(self.context)
        missing = self.context[have:] + self.drafted if have < n else self.drafted[have - n :]
        if self.quick is not None:
            last = self.last_id
            return self.quick.read(missing if last is None else [min(token, last) for token in missing], self.cache)
        return self._read(torch.tensor(missing, device=self.model.device))

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed tokens, shape (n,), to the model and return the next one's logits."""
        ids = self.known(ids)
        out = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1, : self.rows].float()

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

    def sure(self) -> float:
        """Return how likely the coming lookup is right, 0 where the model drafts, or there is none."""
        return self._chance(self._found()) if self.kind == LOOKUP else 0.0

    def offer(self) -> float:
        """Return how likely a lookup in the model's place would be right; 0 if there is none, or tokens are drawn."""
        return 0.0 if self.kind == LOOKUP or self.sampler is not None else self._chance(self._found())

    def _chance(self, found: Proposal | None) -> float:
        return 0.0 if found is None else chance_of(found, self.chances)

    def likeliest(self, signals: np.ndarray) -> tuple[int, torch.Tensor]:
        """Return the model's likeliest next token and its logits; write all signals but the n-gram's."""
        logits = self.logits()
        ((row, *found),) = self.look(logits[None])
        write_looked(found, signals)
        return row if self.head_ids is None else self.head_ids[row], logits

    def look(self, logits: torch.Tensor) -> list[tuple[int, float, float, float, float]]:
        """Do what :func:`look` does, by the quick form's kernel if there is one."""
        return look(logits) if self.quick is None else [self.quick.look(row) for row in logits]

    def settle(self, token: int, logits: torch.Tensor) -> int:
        """Return the token to propose, the likeliest or a draw, and note the distribution that it was drawn from."""
        if self.sampler is None:
            self.proposals.append(None)
            return token
        return self._sample(logits, self.sampler)

    def _sample(self, logits: torch.Tensor, sampler: Sampler) -> int:
        """Draw a token from the draft's distribution, over the whole vocabulary."""
        token, proposal = sampler.propose(self.whole(logits), [*self.context, *self.drafted])
        self.proposals.append(proposal)
        return token

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Spread the logits of the head's rows over the whole vocabulary, shape (vocab_size,)."""
        if self._head_ids is None and len(logits) == self.vocab_size:
            return logits
        full = logits.new_full((self.vocab_size,), float("-inf"))
        where = torch.arange(len(logits), device=logits.device) if self._head_ids is None else self._head_ids
        return full.index_copy_(0, where, logits)

    def end(self, accepted: int) -> None:
        """Drop the cache entries of rejected drafts."""
        self.cache.truncate(min(len(self.cache), len(self.context) + accepted))
        self.drafted, self.proposals = [], []
        self.kind = self.names[0]  # what the next step gets without asking

    def extend(self, tokens: list[int]) -> None:
        """Append settled tokens to the context."""
        self.context += tokens
        self.ngrams.extend(tokens)


class NgramDrafter:
    """Drafts what followed the longest suffix of the context when it occurred before: no model, any target.

    Where no suffix occurred before it proposes nothing, and the step drafts no further. Its signals are the estimate's
    entropy (bits), its confidence, the log-odds of that as margin, and the length of the match.
    """

    names: tuple[str, ...] = (LOOKUP,)
    max_length = 1 << 30
    #: Nothing is read late: there is no cache to fill.
    lag = 1

    def begin(self, tokens: list[int], capacity: int, sampler: Sampler | None = None) -> None:
        """Start a sequence; a sampler changes nothing, as proposals are deterministic."""
        self.ngrams = NgramIndex(tokens)
        self.proposals: list[torch.Tensor | None] = []

    def use(self, name: str) -> str:
        """There is one drafter here."""
        return self.names[0]

    def draft(self, signals: np.ndarray) -> int:
        """Propose one token, or nothing."""
        found = self.ngrams.propose()
        if found is None:
            return NO_PROPOSAL
        write_signals(found, signals)
        self.ngrams.push(found.token)
        self.proposals.append(None)
        return found.token

    def sure(self) -> float:
        """Return the coming proposal's confidence, 0 where there is none."""
        found = self.ngrams.propose()
        return 0.0 if found is None else found.confidence

    def offer(self) -> float:
        """Return 0: no proposal takes a forward."""
        return 0.0

    def end(self, accepted: int) -> None:
        """Take this step's drafts out of the index."""
        self.ngrams.undo()
        self.proposals = []

    def extend(self, tokens: list[int]) -> None:
        """Append settled tokens to the context."""
        self.ngrams.extend(tokens)


def look(logits: torch.Tensor) -> list[tuple[int, float, float, float, float]]:
    """Return for each of some logits, shape (n, rows of the head), what their signals are made of.

    Each is the likeliest row, its logit, the second largest one, the entropy in nats and the confidence.
    """
    top, rows = logits.topk(2)
    p = logits.softmax(-1)
    # One transfer for everything that the host needs; a row index is exact in fp32.
    wanted = torch.stack((rows[:, 0].float(), top[:, 0], top[:, 1], torch.special.entr(p).sum(-1), p.amax(-1)), dim=1)
    return [(int(row), *rest) for row, *rest in wanted.tolist()]


def write_looked(found: Sequence[float], signals: np.ndarray) -> None:
    """Write a model's (N_SIGNALS,) signals, but for the n-gram's.

    Parameters
    ----------
    found : sequence of float
        As from :func:`look`: the two largest logits, the entropy in nats and the confidence. Where they are no numbers,
        as of a model whose logits overflow, the signals are those of one that knows nothing.
    signals : ndarray
        To write to.
    """
    first, second, nats, confidence = found
    known = math.isfinite(first - second + nats + confidence)
    signals[ENTROPY] = nats / math.log(2) if known else CLUELESS
    signals[CONFIDENCE] = confidence if known else 0.0
    signals[MARGIN] = first - second if known else 0.0
