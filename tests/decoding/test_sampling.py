"""Sampled decoding must follow the target's distribution, whatever the draft's is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.drafters.model import ModelDrafter
from speckv_online.errors import UserError
from speckv_online.modeling.sampling import Sampler, residual
from tests.support.decoding import Scripted, plain, prompt_of
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


def distributions(seed: int, n: int, vocab: int, sharpness: float = 2.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(n, vocab)) * sharpness).softmax(-1)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 8), sharpness=st.floats(0, 8), drawn=st.booleans())
def test_one_token_by_enumeration(seed: int, vocab: int, sharpness: float, drawn: bool) -> None:
    """Sum over every draft, accepted or replaced: what is said is distributed as p, to rounding."""
    p, q = distributions(seed, 2, vocab, sharpness)
    proposal = q if drawn else torch.nn.functional.one_hot(q.argmax(), vocab).double()
    said = torch.zeros(vocab, dtype=torch.double)
    for d in range(vocab):
        if proposal[d] == 0:
            continue
        accept = min(1.0, float(p[d] / proposal[d]))
        said[d] += proposal[d] * accept
        if accept < 1:
            said += proposal[d] * (1 - accept) * residual(p, q if drawn else None, d)
    torch.testing.assert_close(said, p, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("drawn", "way"),
    [((True, True), "verify"), ((False, False), "verify"), ((True, False), "verify"), ((True, False), "at once")],
    ids=["drawn", "lookups", "turned", "turned, at once"],
)
def test_verify_follows_the_target_as_root_n(drawn: tuple[bool, bool], way: str) -> None:
    """25,000 runs of two drafts: the distance to p falls as 1/√N, that to a wrong distribution does not."""
    vocab, k, n = 4, 2, 25_000
    p = distributions(1, vocab**k + vocab + 1, vocab).float()  # one row per prefix of up to two tokens
    q = distributions(2, vocab + 1, vocab).float()
    sampler = Sampler(seed=7)
    row = lambda prefix: sum(vocab**i for i in range(len(prefix))) + sum(t * vocab**i for i, t in enumerate(prefix))  # noqa: E731
    rng = np.random.default_rng(3)
    draws = np.empty((n, k), dtype=int)
    cumulative, likeliest = q.double().cumsum(-1).numpy(), q.argmax(-1).tolist()
    logits = p.log()
    for i in range(n):
        prefix, points = list[int](), rng.random(k)
        for j in range(k):
            at = row(prefix)
            point = points[j] * cumulative[at, -1]
            prefix.append(int(np.searchsorted(cumulative[at], point)) if drawn[j] else likeliest[at])
        rows = [row(prefix[:j]) for j in range(k + 1)]
        proposals = [q[rows[j]] if drawn[j] else None for j in range(k)]
        if way == "verify":
            accepted, following = sampler.verify(logits[rows], [], prefix, proposals)
        else:
            accepted, following = sampler.verify_at_once(p[rows], prefix, proposals)
        said = [*prefix[:accepted], following]
        # Cut to two tokens; where only one was said, the plain way says the second.
        if len(said) == 1:
            said.append(sampler.draw(p[row(said)]))
        draws[i] = said[:2]
    truth = np.array([[float(p[0, a] * p[row([a]), b]) for b in range(vocab)] for a in range(vocab)])
    wrong = np.array([[float(q[0, a] * p[row([a]), b]) for b in range(vocab)] for a in range(vocab)])

    def distance(count: int, reference: np.ndarray) -> float:
        seen = np.zeros((vocab, vocab))
        np.add.at(seen, (draws[:count, 0], draws[:count, 1]), 1 / count)
        return float(np.abs(seen - reference).sum() / 2)

    # The expected total variation distance of N draws from the truth is at most √(cells / N) / 2.
    for count in (250, 2_500, n):
        assert distance(count, truth) < np.sqrt(vocab**2 / count)
    assert distance(n, truth) < distance(250, truth) / 3
    assert distance(n, wrong) > 10 * distance(n, truth)


@pytest.mark.parametrize("gammas", [[3], [1, 5, 0, 8]], ids=str)
def test_decoder_samples_the_targets_distribution(gammas: list[int]) -> None:
    """The first two tokens of many short runs against the target's own joint distribution."""
    vocab, n = 6, 1_500
    target = tiny_llama(vocab=vocab)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.3)
    draft = perturbed(target, 0.4)
    prompt = [1, 2, 3, 4]
    with torch.inference_mode():
        first = target(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        rows = target(torch.tensor([[*prompt, a] for a in range(vocab)])).logits[:, -1].softmax(-1)
    truth = (first[:, None] * rows).numpy()
    decoder = SpeculativeDecoder(ModelDrafter(draft, vocab), policy=Scripted(gammas), target=target)
    sampler = Sampler(seed=11)
    seen = np.zeros((vocab, vocab))
    for _ in range(n):
        a, b = decoder.generate(prompt, 2, eos_ids=(), sampler=sampler).tokens
        seen[a, b] += 1
    assert np.abs(seen / n - truth).sum() / 2 < np.sqrt(vocab**2 / n)
    chi2 = ((seen - n * truth) ** 2 / (n * truth)).sum()
    assert chi2 < 35 + 5 * np.sqrt(70)  # mean 35, standard deviation √70 under the truth


def test_zero_temperature_and_processors_stay_greedy(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(12)
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=Scripted([5]), target=tiny_pair.target)
    assert decoder.generate(prompt, 30, sampler=Sampler(0)).tokens == plain(tiny_pair.target, prompt, 30)
    # A processor that looks at the prefix must see, at each drafted position, the prefix of that position.
    ids = torch.tensor([prompt])
    reference = tiny_pair.target.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, repetition_penalty=1.8
    )[0, 12:].tolist()
    assert reference != plain(tiny_pair.target, prompt, 30)
    sampler = Sampler(0, processors=[RepetitionPenaltyLogitsProcessor(1.8)])
    assert decoder.generate(prompt, 30, sampler=sampler).tokens == reference


def test_seeded_runs_repeat(tiny_pair: TinyPair) -> None:
    def run(seed: int) -> list[int]:
        decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=Scripted([4]), target=tiny_pair.target)
        return decoder.generate(prompt_of(8), 30, sampler=Sampler(1.0, top_k=20, top_p=0.9, seed=seed)).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_top_k_and_top_p_bound_what_is_said(tiny_pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=Scripted([4]), target=tiny_pair.target)
    prompt = prompt_of(8)
    assert decoder.generate(prompt, 20, sampler=Sampler(1.0, top_k=1)).tokens == plain(tiny_pair.target, prompt, 20)
    allowed = Sampler(1.0, top_k=3).probabilities(torch.randn(2, 50), []) > 0
    assert allowed.sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("top", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7}], ids=str)
def test_processors_temperature_and_cuts_at_every_position(top: dict[str, float]) -> None:
    """Each row against its definition, with a penalty that depends on the drafts before it."""
    logits, context, drafts = torch.tensor(np.random.default_rng(4).normal(size=(3, 12)) * 2), [1, 2], [7, 5]
    sampler = Sampler(0.7, processors=[RepetitionPenaltyLogitsProcessor(1.6)], **top)  # type: ignore[arg-type]
    found = sampler.probabilities(logits, context, drafts)
    for i, row in enumerate(logits.float()):
        for token in {*context, *drafts[:i]}:
            row[token] = row[token] / 1.6 if row[token] > 0 else row[token] * 1.6
        p = (row / 0.7).softmax(-1)
        order = p.argsort(descending=True)[: int(top.get("top_k", 12))]
        kept = torch.zeros(12)
        kept[order] = p[order] / p[order].sum()
        before = kept[order].cumsum(-1) - kept[order]  # the smallest set that holds top_p: what comes before is less
        kept[order[before >= top.get("top_p", 1.0)]] = 0
        torch.testing.assert_close(found[i], kept / kept.sum(), atol=1e-6, rtol=0)


def test_drafts_are_not_trimmed_when_sampled(tiny_pair: TinyPair) -> None:
    """Dropping a drawn token for what it is would bias the output."""
    policy = Scripted([6], ask_per_token=True)
    decoder = SpeculativeDecoder(tiny_pair.drafter(), policy=policy, target=tiny_pair.target)
    policy.submit = lambda *_: pytest.fail("submit was asked in sampled decoding")  # type: ignore[method-assign]
    decoder.generate(prompt_of(8), 20, sampler=Sampler(1.0))
    assert not decoder.policy.faults


def test_stop_condition_cuts_inside_a_draft(tiny_pair: TinyPair) -> None:
    prompt = prompt_of(8)
    reference = plain(tiny_pair.target, prompt, 30)
    for at in range(1, 12):
        policy = Scripted([7])
        decoder = SpeculativeDecoder(ModelDrafter(tiny_pair.target, 260), policy=policy, target=tiny_pair.target)
        out = decoder.generate(prompt, 30, should_stop=lambda ids, at=at: len(ids) == 8 + at)
        assert (out.tokens, out.finish) == (reference[:at], "stop")
        assert policy.outcomes[-1].produced <= policy.outcomes[-1].labelled + 1


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(-1, 0, 1), (float("nan"), 0, 1), (1, -1, 1), (1, 0, 0)])
def test_impossible_settings_are_refused(temperature: float, top_k: int, top_p: float) -> None:
    with pytest.raises(UserError, match="cannot sample"):
        Sampler(temperature, top_k, top_p)
