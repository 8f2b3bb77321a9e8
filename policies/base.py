"""The interface between a policy and whatever runs it: the decoder on real models, or the simulator on traces.

A step goes: ``decide(context)``, then, if the decision asked for it, ``proceed(decision, draft)`` after each drafted
token and ``submit(decision, draft)`` once all are there, then verification, and some time later (in batches, out of
order, perhaps twice) ``learn(decision, outcome)``. A policy sees only what exists at the time of each call. All that it
is given is its own: nothing that it writes there reaches the decoder.

Units: times are seconds, entropies bits, confidences probabilities, margins logits, lengths tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

State: TypeAlias = dict[str, np.ndarray]

#: Speculation lengths that arm-based policies choose from by default.
ARMS: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 12, 16)
MAX_GAMMA = 16

#: Columns of a signals array, one row per drafted token.
ENTROPY, CONFIDENCE, MARGIN, NGRAM = range(4)
N_SIGNALS = 4

#: Name of the drafter that only looks up: its tokens take no forward of a model, and it may have nothing to propose.
LOOKUP = "ngram"

#: Lagged signals before anything was drafted: mean entropy and confidence, largest entropy, least confidence,
#: acceptance.
NEUTRAL = (2.0, 0.5, 4.0, 0.25, 0.5)
#: What is left of a lagged signal's difference from neutral after each step that drafts nothing.
FADE = 0.9

#: MLP16's code for a compression level (design of the released weights).
LEVEL_CODES = {"fp16": 0.0, "int8": 1.0, "nf4": 2.0}


class PolicyError(ValueError):
    """Bad policy name, option or state; the message is one line that says what to do."""


def reason(error: Exception) -> str:
    """Return what an exception says, in one line of at most 300 characters: those of damaged files quote them."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@dataclass(slots=True)
class Context:
    """What is known before anything is drafted in a step.

    The four signal summaries are *lagged*: they describe the tokens drafted in the latest earlier step of the same
    sequence that drafted any, and hold neutral values before that.

    Attributes
    ----------
    level : str
        Compression level of the target, e.g. ``"nf4"``.
    task : str
        Task label of the prompt, empty if unknown.
    step, position, context_length : int
        Steps taken and tokens produced so far for this prompt; tokens in the target's context.
    max_gamma : int
        Most tokens that this step may draft (less near the end of the budget).
    remaining : int
        Most tokens that may still be produced: what is left of the budget. Very large where there is none.
    last_drafted, last_accepted : int
        Outcome of the step before; zero at the first step.
    idle : int
        Steps since anything was drafted: how old the lagged signals are.
    acceptance : float
        Exponentially weighted accepted/tested of this sequence.
    mean_entropy, mean_confidence, max_entropy, min_confidence : float
        Lagged signals (bits, probability).
    drafters : tuple of str
        Names that ``Decision.drafter`` may take, the default one first; empty where there is no choice.
    tokens : sequence of int
        Ids of the tokens in the target's context, read-only; it grows as the text does. Empty where the caller does not
        tell.
    lookup_confidence : float
        How sure the drafter is of its first token in this step if that is a lookup's proposal, which takes no forward
        of a model; 0 if it takes one.
    lookup_alternative : float
        If the first token takes a forward: how sure the drafter is of the lookup that it could have instead, by going
        on as the drafter ``ngram`` (:attr:`Decision.drafter`, :meth:`Policy.proceed`); 0 if it has none.
    memory : dict
        Scratch space of the policy for this sequence; new for every prompt.
    rows : int
        How many sequences share the target's forward, 1 alone.
    unread : int
        Tokens that the draft model has to read before its first draft, beyond the latest one.
    """

    level: str = "fp16"
    task: str = ""
    step: int = 0
    position: int = 0
    context_length: int = 0
    max_gamma: int = MAX_GAMMA
    remaining: int = 1 << 62
    last_drafted: int = 0
    last_accepted: int = 0
    idle: int = 0
    acceptance: float = 0.5
    mean_entropy: float = 2.0
    mean_confidence: float = 0.5
    max_entropy: float = 4.0
    min_confidence: float = 0.25
    drafters: tuple[str, ...] = ()
    tokens: Sequence[int] = ()
    lookup_confidence: float = 0.0
    lookup_alternative: float = 0.0
    memory: dict[Any, Any] = field(default_factory=dict)
    rows: int = 1
    unread: int = 0


class Draft(NamedTuple):
    """What has been drafted so far in a step: what :meth:`Policy.proceed` and :meth:`Policy.submit` are shown.

    Attributes
    ----------
    drafted : int
        How many tokens.
    signals : ndarray, shape (drafted, N_SIGNALS)
        Their signals, read-only.
    tokens : sequence of int
        Their ids; empty where the caller does not tell.
    lookups : sequence of float
        For each of them, and for the next one: how sure the drafter is of it if it is a lookup's proposal, 0 if it
        takes a forward of a model. Empty where the caller does not tell.
    lookup_alternative : float
        If the next token takes a forward: how sure the drafter is of the lookup that it could have instead; 0 if it has
        none, and in :meth:`Policy.submit`.
    """

    drafted: int
    signals: np.ndarray
    tokens: Sequence[int] = ()
    lookups: Sequence[float] = ()
    lookup_alternative: float = 0.0


@dataclass(slots=True)
class Decision:
    """What a policy wants done in one step.

    Attributes
    ----------
    id : int
        Unique among all decisions of a run, see :meth:`Policy.new_id`; ``learn`` is idempotent by it.
    gamma : int
        Most tokens to draft; 0 is plain decoding.
    ask_per_token : bool
        True if :meth:`Policy.proceed` is to be asked after each drafted token but the last, and
        :meth:`Policy.submit` once all are there.
    propensity : float
        Probability with which this gamma was chosen, 1 for deterministic policies.
    policy_version : int
        Version of the statistics that made the choice.
    features : object
        What ``learn`` needs to know of the context, None for nothing; the policy's own affair.
    drafter : str
        Which of ``context.drafters`` to use in this step, empty for the default one.
    ask_at_submit : bool
        True if :meth:`Policy.submit` is to be asked even though :meth:`Policy.proceed` is not.
    """

    id: int
    gamma: int
    ask_per_token: bool = False
    propensity: float = 1.0
    policy_version: int = 0
    features: Any = None
    drafter: str = ""
    ask_at_submit: bool = False


@dataclass(slots=True)
class Outcome:
    """What a step turned out to be.

    Attributes
    ----------
    drafted, accepted : int
        k and n. ``accepted <= drafted``.
    labelled : int
        Positions whose label is known: ``n + 1`` after a rejection, else ``n`` (also where an accepted end-of-sequence
        token cut the step short).
    produced : int
        Tokens that the step added to the output: ``n + 1`` unless the end was reached.
    seconds, draft_seconds, verify_seconds : float
        Whole step and its two main parts; zero where they are not known, or not those of a usual step (in a first step
        the target reads the prompt too, so that only the draft's seconds are told).
    level : str
        Compression level, for policies that keep a cost model per level.
    context_length : int
        As in the context of the decision.
    caught_up : int
        Extra context tokens that a drafter that lagged behind had to read first: its time is not typical.
    signals : ndarray, shape (drafted, N_SIGNALS)
        Signals of every drafted token.
    drafter : str
        Name of the drafter of this step, empty if there was none to choose.
    forwards : int
        Tokens that took a forward of the draft model, also those that the policy dropped again: what the draft seconds
        paid for. By default all of ``drafted``.
    exhausted : bool
        True if the step's drafter had nothing more to propose after these tokens, so that a longer draft would have
        been the same: lookups end like that, models never do, nor does a drafter that the policy left within the step.
    policy_seconds : float
        What the policy took of ``seconds``: to decide, and to learn from the step before. Zero in replays.
    tokens : sequence of int
        Ids of the drafted tokens; empty where the caller does not tell.
    lookups : sequence of float
        How sure the drafter was of each drafted token if it was a lookup's proposal, else 0. Empty where nobody tells.
    threads : int
        Threads of the forwards, where the number may change; else 0. Another number means other seconds.
    """

    drafted: int
    accepted: int
    labelled: int
    produced: int
    seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    level: str = "fp16"
    context_length: int = 0
    caught_up: int = 0
    signals: np.ndarray = field(default_factory=lambda: np.empty((0, N_SIGNALS)))
    drafter: str = ""
    forwards: int = -1
    policy_seconds: float = 0.0
    exhausted: bool = False
    tokens: Sequence[int] = ()
    lookups: Sequence[float] = ()
    threads: int = 0

    def __post_init__(self) -> None:
        if self.forwards < 0:
            self.forwards = self.drafted

    @property
    def rejected(self) -> bool:
        """True if the target refused a drafted token."""
        return self.labelled > self.accepted


class Policy(ABC):
    """Base class of all policies: implement :meth:`decide`, and :meth:`learn` if the policy adapts.

    Parameters
    ----------
    seed : int
        Seeds ``self.rng``, the policy's only source of randomness.
    worker : int
        Distinguishes the decision ids of copies of a policy that run side by side.
    """

    #: One line for ``speckv policies``.
    summary: ClassVar[str] = ""
    #: True if the policy changes with what it observes, estimates of times aside.
    learns: ClassVar[bool] = False
    #: True for policies that decide a batch's rows together, see :mod:`policies.batches`.
    joint: bool = False
    #: True for policies that decide a serving engine's steps, see :mod:`policies.steps`.
    in_steps: bool = False

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        self.rng = np.random.default_rng([seed, worker])
        self.version = 0
        self._id = worker << 40
        self._learnt: dict[int, None] = {}

    def new_id(self) -> int:
        """Return a fresh decision id."""
        self._id += 1
        return self._id

    def first_time(self, id: int) -> bool:
        """Return True the first time that an id is seen; the latest 65,536 at least are remembered."""
        if id in self._learnt:
            return False
        self._learnt[id] = None
        if len(self._learnt) > 2 * 65_536:
            self._learnt = dict.fromkeys([*self._learnt][-65_536:])
        return True

    def has_learnt(self, id: int) -> bool:
        """Return whether :meth:`first_time` has seen an id."""
        return id in self._learnt

    def begin(self, context: Context) -> None:
        """Start a new prompt; per-sequence state is reset here."""

    @abstractmethod
    def decide(self, context: Context) -> Decision:
        """Choose what to do in a step. Each step has a context object of its own."""

    def proceed(self, decision: Decision, draft: Draft) -> bool | str:
        """Return whether to draft another token, given those drafted so far.

        One of ``context.drafters``, by name, means to go on as that drafter until the step ends. Lookups alone take
        next to nothing: they are then drafted to the end unasked, and :meth:`submit` sees them all.
        """
        return True

    def submit(self, decision: Decision, draft: Draft) -> int:
        """Return how many of the drafted tokens to send to the target.

        Asked of a decision that ``ask_per_token`` or ``ask_at_submit``. In sampled decoding a drawn token may not be
        dropped for what it is: it is asked only of drafts that end with lookups, and only those are dropped.
        """
        return draft.drafted

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Take in the outcome of a decision; a second call with the same id changes nothing."""

    def pmf(self, context: Context) -> np.ndarray | None:
        """Probability of each of the policy's arms (:data:`ARMS` by default); None if certain or not known."""
        return None

    def state_dict(self) -> State:
        """Everything that was learnt, as arrays; ``{}`` for policies that do not learn."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore :meth:`state_dict`'s arrays; raises :class:`PolicyError` if they do not fit."""
        if state:
            raise PolicyError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")

    def take_delta(self) -> State:
        """Return the additive statistics gathered since the last call (empty if the policy has none to share)."""
        return {}

    def merge(self, delta: State) -> None:
        """Add another copy's statistics, as :meth:`take_delta` returned them."""

    def info(self) -> dict[str, Any]:
        """Small facts for reports, e.g. the current estimate of the best rate."""
        return {}
