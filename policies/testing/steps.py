"""Steps of a made-up decoder: what is drafted is accepted by chance, and each answer of the policy is checked."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from policies.base import (
    CONFIDENCE,
    ENTROPY,
    MARGIN,
    MAX_GAMMA,
    N_SIGNALS,
    NGRAM,
    Context,
    Decision,
    Draft,
    Outcome,
    Policy,
)

#: Level -> seconds of a drafted token, of verifying one token, and of each further one.
COSTS = {"fp16": (0.010, 0.050, 0.017), "int8": (0.010, 0.250, 0.004), "nf4": (0.010, 0.160, 0.010)}
#: Seconds of a step besides, and weight of the latest step in a sequence's acceptance.
OVERHEAD, WEIGHT = 0.001, 0.2


@dataclass
class Text:
    """The output of one made-up prompt.

    Attributes
    ----------
    matches : ndarray of bool, shape (length + 16,)
        Whether the draft agrees with the target, at each position.
    signals : ndarray, shape (length + 16, N_SIGNALS)
        What the draft's signals are there.
    """

    matches: np.ndarray
    signals: np.ndarray

    def __len__(self) -> int:
        return len(self.matches) - MAX_GAMMA

    def accepted(self, start: int, drafted: int) -> int:
        """Return how many of so many tokens drafted from a position on are accepted."""
        run = self.matches[start : start + drafted]
        return len(run) if run.all() else int(run.argmin())


def make_texts(seed: int, count: int = 3, length: int = 100) -> list[Text]:
    """Make texts with easy and hard stretches; the draft's confidence tells a good part of it.

    >>> [len(text) for text in make_texts(0, count=2, length=50)]
    [50, 50]
    """
    rng = np.random.default_rng(seed)
    return [_make_text(rng, length + MAX_GAMMA) for _ in range(count)]


def _make_text(rng: np.random.Generator, total: int) -> Text:
    ease = np.convolve(rng.normal(size=total + 15), np.full(16, 0.4), "valid")
    logit = ease + rng.normal(size=total)
    matches = rng.random(total) < 1.0 / (1.0 + np.exp(-logit))
    confidence = 1.0 / (1.0 + np.exp(-0.8 * logit - 0.5 * rng.normal(size=total)))
    signals = np.zeros((total, N_SIGNALS))
    signals[:, ENTROPY] = 4.0 * (1.0 - confidence) + 0.3 * rng.random(total)
    signals[:, CONFIDENCE] = confidence
    signals[:, MARGIN] = 8.0 * confidence * rng.uniform(0.8, 1.2, total)
    signals[:, NGRAM] = rng.integers(-2, 3, total)
    return Text(matches, signals)


def play(
    policy: Policy,
    texts: Sequence[Text],
    level: str = "nf4",
    *,
    learn: bool = True,
    drafters: tuple[str, ...] = (),
    noise: float = 0.05,
    seed: int = 0,
) -> list[tuple[Decision, Outcome]]:
    """Let a policy decode texts, in the order of calls of a decoder, and return its decisions and their outcomes.

    Parameters
    ----------
    policy : Policy
    texts : sequence of Text
    level : str
        Compression level; one of :data:`COSTS`, or any other, which costs as nf4 does.
    learn : bool
        Tell the policy each outcome at once; otherwise it is told none.
    drafters : tuple of str
        What ``context.drafters`` says.
    noise : float
        Standard deviation of the logarithm of times.
    seed : int
        Of the noise.

    Raises
    ------
    AssertionError
        As :func:`take_step`.
    """
    rng, found = np.random.default_rng(seed), []
    for text in texts:
        at = 0
        context = Context(level=level, task="chat", context_length=50, drafters=drafters)
        policy.begin(context)
        while at < len(text):
            context.remaining = len(text) - at
            context.max_gamma = min(MAX_GAMMA, context.remaining - 1)
            decision, outcome = take_step(policy, context, text, at)
            jitter = np.exp(noise * rng.normal(size=2))
            outcome.draft_seconds *= float(jitter[0])
            outcome.verify_seconds *= float(jitter[1])
            outcome.seconds = outcome.draft_seconds + outcome.verify_seconds + OVERHEAD
            found.append((decision, outcome))
            if learn:
                policy.learn(decision, outcome)
            at += outcome.produced
            _advance(context, outcome)
    return found


def take_step(policy: Policy, context: Context, text: Text, at: int = 0) -> tuple[Decision, Outcome]:
    """Let a policy decide a step at a position of a text, and return the decision and its outcome.

    Raises
    ------
    AssertionError
        If an answer of the policy is none that it may give, or if it changed what it was only to read.
    """
    before = replace(context)
    decision = policy.decide(context)
    for name in (f for f in Context.__dataclass_fields__ if f != "memory"):
        seen, now = getattr(before, name), getattr(context, name)
        assert seen == now, f"decide changed context.{name} from {seen!r} to {now!r}: a context is only to be read"
    _check_decision(decision, context)
    signals, drafter, k = np.zeros((MAX_GAMMA, N_SIGNALS)), decision.drafter, 0
    while k < decision.gamma:
        signals[k] = text.signals[at + k]
        k += 1
        if decision.stops and k < decision.gamma:
            answer = policy.proceed(decision, Draft(k, signals[:k]))
            if isinstance(answer, str):
                assert answer in context.drafters, f"proceed answered {answer!r}, not one of {context.drafters}"
            else:
                assert isinstance(answer, bool | np.bool_), f"proceed answered {answer!r}, no bool and no drafter"
                if not answer:
                    break
    forwards = k
    if k and (decision.stops or decision.trims):
        kept = policy.submit(decision, Draft(k, signals[:k]))
        k = _whole(kept)
        assert 0 <= k <= forwards, f"submit answered {kept!r} with {forwards} tokens drafted"
    assert np.array_equal(signals[:forwards], text.signals[at : at + forwards]), "the policy changed the signals"
    n = text.accepted(at, k)
    draft, first, further = COSTS.get(context.level, COSTS["nf4"])
    times = draft * forwards, first + further * k
    return decision, Outcome(
        k, n, min(n + 1, k), n + 1, sum(times) + OVERHEAD, *times, context.level, context.context_length,
        signals=signals[:k].copy(), drafter=drafter or (context.drafters[0] if context.drafters else ""),
        forwards=forwards,
    )  # fmt: skip


def _check_decision(decision: Decision, context: Context) -> None:
    assert isinstance(decision, Decision), f"decide returned {decision!r}, which is no Decision"
    gamma, most = decision.gamma, context.max_gamma
    assert 0 <= _whole(gamma) <= most, f"decide answered gamma {gamma!r} where 0 to {most} is allowed"
    assert _whole(decision.id) > 0, f"a decision's id must be that of new_id(), got {decision.id!r}"
    propensity = decision.propensity
    assert 0.0 < propensity <= 1.0 + 1e-9, f"a propensity must be above 0 and at most 1, got {propensity!r}"
    drafter, known = decision.drafter, context.drafters
    assert not drafter or drafter in known, f"decide asked for the drafter {drafter!r}, not one of {known}"


def _whole(value: object) -> int:
    """Return a whole number as an int, -1 for anything else."""
    if isinstance(value, bool | np.bool_):
        return -1
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1


def _advance(context: Context, outcome: Outcome) -> None:
    """Move a context past a step, as decoders do."""
    context.step += 1
    context.position += outcome.produced
    context.context_length += outcome.produced
    context.last_drafted, context.last_accepted = outcome.drafted, outcome.accepted
    if outcome.tested:
        context.acceptance += WEIGHT * (outcome.accepted / outcome.tested - context.acceptance)
    context.idle += 1
    if outcome.drafted:
        context.idle = 0
        entropy, confidence = outcome.signals[:, ENTROPY], outcome.signals[:, CONFIDENCE]
        context.mean_entropy, context.max_entropy = float(entropy.mean()), float(entropy.max())
        context.mean_confidence, context.min_confidence = float(confidence.mean()), float(confidence.min())
