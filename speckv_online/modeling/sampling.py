"""Speculative sampling: how tokens are drawn, and how drafted ones are accepted without changing the distribution.

A drafted token d, drawn from q, is accepted with probability min(1, p(d) / q(d)); after a rejection the token comes
from the normalised (p − q)₊ instead. What comes out is distributed as p (Leviathan et al., 2023; Chen et al., 2023). A
deterministic proposal is the case of a one-hot q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from speckv_online.errors import UserError
from speckv_online.modeling.warpers import PREFIX_FREE, Warpers, draw_from, is_usual

#: transformers' own processors that are functions of the tokens and scores alone, each row's of its own. Nobody can
#: tell how often they are asked, or about what. All others may keep a state, or know some prefixes only.
_PURE = {
    EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor, EpsilonLogitsWarper, EtaLogitsWarper,
    ExponentialDecayLengthPenalty, ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor, LogitNormalization, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor, SuppressTokensAtBeginLogitsProcessor, SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper, WatermarkLogitsProcessor,
}  # fmt: skip


class PaddedProcessor(LogitsProcessor):
    """A processor that sees the padding before a prompt, as in transformers: some of them count tokens."""

    def __init__(self, inner: LogitsProcessor, pads: list[int]) -> None:
        self.inner, self.pads = inner, pads

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before = torch.tensor([self.pads], device=input_ids.device)
        return self.inner(torch.cat((before, input_ids), 1), scores)


def is_pure(processor: LogitsProcessor) -> bool:
    """Whether a processor is known to be a function of one row's tokens and scores, which may be asked at any time."""
    return type(processor.inner if isinstance(processor, PaddedProcessor) else processor) in _PURE


class Chain:
    """Processors that scores go through, split into those that are asked first and the usual warpers at the end.

    Parameters
    ----------
    processors : sequence of LogitsProcessor
        All of them, in order.

    Attributes
    ----------
    needs_prefix : bool
        Whether any of them looks at the tokens before.
    """

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        usual = len(processors)
        while usual and is_usual(processors[usual - 1]):
            usual -= 1
        self._all, self._first = _listed(processors), _listed(processors[:usual])
        self.needs_prefix = not all(type(p) in PREFIX_FREE for p in processors)
        self._warpers = Warpers(processors[usual:])

    def scores(self, scores: torch.Tensor, context: list[int], drafts: Sequence[int] = ()) -> torch.Tensor:
        """Return what all of them make of scores, shape (n, vocab); row i follows the first i drafts."""
        return torch.cat(list(self._through(self._all, scores, context, drafts)))

    def distributions(
        self, scores: torch.Tensor, context: list[int], drafts: Sequence[int] = ()
    ) -> Iterator[torch.Tensor]:
        """Yield each row's distribution, shape (vocab,); on the host it is made when it is asked for."""
        if scores.device.type != "cpu":
            yield from self.scores(scores, context, drafts).softmax(-1)
            return
        for part in self._through(self._first, scores, context, drafts):
            for row in part.numpy():
                yield torch.from_numpy(self._warpers.distribution(row))

    def _through(
        self,
        processors: Callable[..., torch.Tensor] | None,
        scores: torch.Tensor,
        context: list[int],
        drafts: Sequence[int],
    ) -> Iterator[torch.Tensor]:
        """Yield what processors make of the scores, all rows at once or one by one."""
        if processors is None:
            yield scores
        elif not self.needs_prefix:
            yield processors(None, scores)
        else:
            ids, n = torch.tensor([[*context, *drafts]], device=scores.device), len(context)
            for i in range(len(scores)):
                yield processors(ids[:, : n + i], scores[i : i + 1])


def _listed(processors: Sequence[LogitsProcessor]) -> Callable[..., torch.Tensor] | None:
    return LogitsProcessorList(processors) if processors else None


class Sampler:
    """The distribution that tokens come from, and the randomness that they are drawn with.

    Parameters
    ----------
    temperature : float
        0 is greedy decoding.
    top_k : int
        Keep the k likeliest tokens; 0 keeps all.
    top_p : float
        Keep the smallest set of likeliest tokens that holds this much probability.
    processors : list of LogitsProcessor, optional
        Applied first. Those that :func:`is_pure` does not know see the prefixes that plain decoding shows them only, in
        its order and once each; the others are applied to the draft's scores too.
    seed : int or torch.Generator
        A seeded run repeats itself.
    device : torch.device
        Where the scores are.

    Attributes
    ----------
    in_order : bool
        Whether a verification must go row by row, and end at the first rejection and where the sequence ends.
    kept : list of Tensor or None
        If a list, the processed scores of each new token are appended, shape (1, vocab); set ``in_order`` with it.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        processors: Sequence[LogitsProcessor] = (),
        seed: int | torch.Generator = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(f"cannot sample with temperature {temperature}, top-k {top_k}, top-p {top_p}")
        self.greedy = temperature == 0
        chain = list(processors)
        if not self.greedy:
            chain += [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
            chain += [TopKLogitsWarper(top_k)] if top_k else []
            chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        # What looks at the scores alone need not see the padding.
        chain = [p.inner if isinstance(p, PaddedProcessor) and type(p.inner) in PREFIX_FREE else p for p in chain]
        pure = [p for p in chain if is_pure(p)]
        self._chain, self._on_drafts = Chain(chain), Chain(pure)
        self.in_order = len(pure) < len(chain)
        self.kept: list[torch.Tensor] | None = None
        self.generator = seed if isinstance(seed, torch.Generator) else torch.Generator(device).manual_seed(seed)

    def probabilities(self, logits: torch.Tensor, context: list[int], drafts: Sequence[int] = ()) -> torch.Tensor:
        """Return the distribution of the next token for each row.

        Parameters
        ----------
        logits : Tensor, shape (n, vocab)
            Row i follows ``context`` and the first i tokens of ``drafts``.
        context : list of int
            Settled tokens; read only if a processor looks at them.
        drafts : sequence of int
            At least n − 1 tokens.

        Returns
        -------
        Tensor, shape (n, vocab), fp32
            One-hot rows in greedy decoding.
        """
        return torch.stack(list(self._distributions(self._chain, logits.float(), context, drafts)))

    def _distributions(
        self, chain: Chain, scores: torch.Tensor, context: list[int], drafts: Sequence[int] = ()
    ) -> Iterator[torch.Tensor]:
        if self.greedy:
            return iter(self.distribution(chain.scores(scores, context, drafts)))
        return chain.distributions(scores, context, drafts)

    def next_distribution(self, logits: torch.Tensor, context: list[int]) -> torch.Tensor:
        """Return the distribution, shape (vocab,), of the token after ``context``; processors are asked once.

        ``logits`` are the target's, shape (1, vocab); they stay as they are.
        """
        scores = self._chain.scores(logits.to(torch.float32, copy=True), context)
        if self.kept is not None:
            self.kept.append(scores)
        return self.distribution(scores)[0]

    def distribution(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the distributions, shape (n, vocab), that processed scores stand for."""
        if self.greedy:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        return scores.softmax(-1)

    def draw(self, probabilities: torch.Tensor) -> int:
        """Draw one token from a distribution of shape (vocab,)."""
        if self.greedy:
            return int(probabilities.argmax())
        if probabilities.device.type != "cpu":
            return int(torch.multinomial(probabilities, 1, generator=self.generator))
        return draw_from(probabilities.numpy(), self._uniform())

    def accepts(self, p: float, q: float) -> bool:
        """Return True with probability min(1, p / q); False where p is no number: whoever draws then will say so."""
        return self._uniform() * q < p

    def _uniform(self) -> float:
        """Return a number that is uniform in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self.generator, device=self.generator.device).item()

    @property
    def draft_needs_prefix(self) -> bool:
        """Whether :meth:`propose` looks at the tokens before a draft; else a part of the vocabulary is as good."""
        return self._on_drafts.needs_prefix

    def propose(self, logits: torch.Tensor, context: list[int]) -> tuple[int, torch.Tensor | None]:
        """Draw a draft after ``context`` from a drafter's logits, shape (vocab,); return it and what it was drawn from.

        A drafter may not know any token that the processors allow: then its likeliest one is proposed as it is.
        """
        proposal = next(self._distributions(self._on_drafts, logits[None].float(), context))
        largest = (proposal.numpy() if proposal.device.type == "cpu" else proposal).max().item()
        if largest != largest:  # as it does if any is no number
            return int(logits.argmax()), None
        return self.draw(proposal), proposal

    def verify(
        self,
        logits: torch.Tensor,
        context: list[int],
        drafts: Sequence[int],
        proposals: Sequence[torch.Tensor | None],
    ) -> tuple[int, int]:
        """Accept a run of drafted tokens and draw the one after it.

        Parameters
        ----------
        logits : Tensor, shape (k + 1, vocab)
            The target's, as for :meth:`probabilities`.
        context : list of int
            Settled tokens.
        drafts : sequence of int
            The k drafted tokens.
        proposals : sequence of (Tensor of shape (vocab,) or None)
            The distribution q that each was drawn from; None for a deterministic proposal.

        Returns
        -------
        accepted, next : int
            Number of accepted tokens, and the token that follows them.
        """
        if logits.device.type != "cpu":
            return self.verify_at_once(self.probabilities(logits, context, drafts), drafts, proposals)
        # Row by row, up to the first refusal: what a row costs is its whole vocabulary.
        rows = self._distributions(self._chain, logits.float(), context, drafts)
        for i, (draft, proposal) in enumerate(zip(drafts, proposals, strict=True)):
            token, accepted = self.judge(next(rows), draft, proposal)
            if not accepted:
                return i, token
        return len(drafts), self.draw(next(rows))

    def verify_at_once(
        self, target: torch.Tensor, drafts: Sequence[int], proposals: Sequence[torch.Tensor | None]
    ) -> tuple[int, int]:
        """Do what :meth:`verify` does with the target's distributions, shape (k + 1, vocab), in one transfer."""
        if not drafts:
            return 0, self.draw(target[0])
        uniform = torch.rand(len(drafts), generator=self.generator, device=target.device)
        q = torch.stack([target.new_ones(()) if p is None else p[d] for d, p in zip(drafts, proposals, strict=True)])
        p = target[range(len(drafts)), list(drafts)]
        refused = torch.nonzero(~(uniform * q < p))  # so that a p which is no number refuses too, and drawing tells
        if not len(refused):
            return len(drafts), self.draw(target[-1])
        n = int(refused[0])
        return n, self.draw(residual(target[n], proposals[n], drafts[n]))

    def judge(self, target: torch.Tensor, draft: int, proposal: torch.Tensor | None) -> tuple[int, bool]:
        """Return the next token, and whether it is the draft, accepted as in :meth:`verify`.

        ``target`` is the target's distribution, shape (vocab,). A draft that it makes impossible is never accepted.
        """
        q = 1.0 if proposal is None else float(proposal[draft])
        if self.accepts(float(target[draft]), q):
            return draft, True
        return self.draw(residual(target, proposal, draft)), False


def residual(p: torch.Tensor, q: torch.Tensor | None, drafted: int) -> torch.Tensor:
    """Return the distribution of the token that replaces a rejected one: (p − q)₊, normalised.

    ``q`` is None for a deterministic proposal, the one-hot distribution at ``drafted``. Where rounding leaves nothing
    of the difference, p and q are equal, and p itself is returned.
    """
    if p.device.type == "cpu":
        return torch.from_numpy(_residual(p.numpy(), None if q is None else q.numpy(), drafted))
    return _residual(p, q, drafted)


def _residual(p: Any, q: Any, drafted: int) -> Any:
    """Do what :func:`residual` does with tensors, or with arrays, which wake no threads."""
    if q is None:
        rest = p + 0
        rest[drafted] = 0
    else:
        rest = (p - q).clip(0)
    total = rest.sum()
    return rest / total if total > 0 else p
