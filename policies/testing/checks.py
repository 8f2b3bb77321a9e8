"""What every policy promises, each promise as a check that says in one line how it was broken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from policies.base import ARMS, MAX_GAMMA, Context, Decision, Outcome, Policy, PolicyError, State
from policies.guards.fault import Wrapper
from policies.registry import make_policy
from policies.testing.steps import COSTS, make_texts, play, take_step

#: Builds a policy, the same each time.
Make = Callable[[], Policy]
#: Levels that are played: the usual ones, and one that no policy knows.
LEVELS = (*COSTS, "odd:bits=3")


def check_policy(
    policy: str | Callable[..., Policy], *, seed: int = 3, skip: Collection[str] = (), **options: Any
) -> None:
    """Check that a policy keeps the promises of :class:`~policies.base.Policy`, in a made-up world, within seconds.

    It is checked as it is: no guard repairs its answers.

    >>> check_policy("fixed:4")

    Parameters
    ----------
    policy : str, type or callable
        A spec string, a class, or whatever returns a fresh policy when it is called with ``seed`` and the options.
    seed : int
        Seed of the policy.
    skip : collection of str
        Promises, as :data:`PROMISES` names them, that the policy is known to break.
    **options
        For the constructor. Of a spec string's, those that the policy does not have are left out.

    Raises
    ------
    AssertionError
        If a promise is broken: the message names the policy, the promise, and what happened.
    PolicyError
        If there is no such policy.
    """
    if unknown := sorted(set(skip) - set(PROMISES)):
        raise ValueError(f"there is no promise {unknown[0]!r} to skip: choose from {', '.join(PROMISES)}")
    if isinstance(policy, str):
        spec, name = policy, policy

        def make() -> Policy:
            return make_policy(spec, bare=True, seed=seed, **options)
    else:
        build, name = policy, getattr(policy, "__name__", repr(policy))

        def make() -> Policy:
            return build(seed=seed, **options)

    make()  # one that cannot be built has a line of its own
    for promise, check in PROMISES.items():
        if promise in skip:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check(make)
        except AssertionError as broken:
            raise AssertionError(f"{name} breaks the promise {promise!r}: {broken}") from None
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise AssertionError(f"{name} breaks the promise {promise!r}: it raised {what}") from error


def _answers(make: Make) -> None:
    """Answers are legal at every level, near the end of the budget, and with several drafters to choose from."""
    policy, ids = make(), set()
    for level in LEVELS:
        for drafters in ((), ("model", "ngram")):
            for decision, _ in play(policy, make_texts(1, 1, 60), level, drafters=drafters):
                assert decision.id not in ids, f"two decisions have the id {decision.id}: take it from new_id()"
                ids.add(decision.id)
    rng, (text,) = np.random.default_rng(2), make_texts(3, 1, MAX_GAMMA)
    for _ in range(60):
        context = Context(
            level=str(rng.choice(LEVELS)), step=int(rng.integers(500)), position=int(rng.integers(4000)),
            context_length=int(rng.integers(1, 100_000)), max_gamma=int(rng.integers(MAX_GAMMA + 1)),
            last_drafted=int(rng.integers(MAX_GAMMA + 1)), acceptance=float(rng.random()),
            mean_entropy=float(16 * rng.random()), mean_confidence=float(rng.random()),
            max_entropy=16.0, min_confidence=0.0,
        )  # fmt: skip
        policy.learn(*take_step(policy, context, text))


def _repeats(make: Make) -> None:
    """One seed, one run."""
    _same_run(make(), make(), "two copies with one seed decide differently: draw from self.rng alone")


def _duplicates(make: Make) -> None:
    """An outcome that comes twice teaches once."""
    steps = _history(make)
    once, twice = make(), make()
    for step in steps:
        once.learn(*step)
        twice.learn(*step)
        twice.learn(*step)
    for step in steps:
        twice.learn(*step)
    _same_state(once.state_dict(), twice.state_dict(), "learning from an outcome twice changed the state")


def _late(make: Make) -> None:
    """Outcomes may come late, out of order, or never; what they hold is only to be read."""
    steps, policy = _history(make), make()
    held = [outcome.signals.copy() for _, outcome in steps]
    for i in np.random.default_rng(0).permutation(len(steps))[5:].tolist():
        policy.learn(*steps[i])
    for (_, outcome), signals in zip(steps, held, strict=True):
        assert np.array_equal(outcome.signals, signals), "learn changed an outcome's signals"
    play(policy, make_texts(4, 1, 30))


def _state(make: Make) -> None:
    """A state is a dict of finite arrays, and a fresh copy that takes it over has the same one."""
    policy, again = make(), make()
    play(policy, make_texts(5, 2))
    state = _checked(policy.state_dict(), "state_dict")
    again.load_state_dict(copy.deepcopy(state))
    _same_state(again.state_dict(), state, "state_dict after load_state_dict is not what was loaded")


def _copied(make: Make) -> None:
    """What goes out is the caller's, and what comes in is only to be read."""
    policy, again = make(), make()
    play(policy, make_texts(5, 1))
    play(again, make_texts(13, 1, 40))
    delta, state = policy.take_delta(), policy.state_dict()
    kept = copy.deepcopy([delta, state])
    given = copy.deepcopy(kept)
    for array in (np.asarray(value) for part in given for value in part.values()):
        array.flags.writeable = False
    again.merge(given[0])
    again.load_state_dict(given[1])
    taken = copy.deepcopy(again.state_dict())
    _same_state(taken, state, "load_state_dict after merge is not what was loaded")
    again.merge(again.take_delta())
    _same_state(again.state_dict(), taken, "load_state_dict keeps what was not handed out yet: drop it")
    for one in (policy, again):
        play(one, make_texts(12, 1, 60))
    for was, now, what in zip(kept, (delta, state), ("take_delta", "state_dict"), strict=True):
        _same_state(now, was, f"what {what} returned changed while the policy learnt on: return copies")


def _restores(make: Make) -> None:
    """A restored copy goes on as the saved policy does, chance aside."""
    policy, again = make(), make()
    play(policy, make_texts(5, 2))
    state = copy.deepcopy(policy.state_dict())
    for one in (policy, again):
        _bare(one).rng = np.random.default_rng(1)
        one.load_state_dict(copy.deepcopy(state))  # the saved one too: both then refresh at the same steps
    _same_run(policy, again, "a copy that was given the state decides differently: state_dict lacks something")


def _refuses(make: Make) -> None:
    """A state that does not fit is refused with a PolicyError."""
    policy = make()
    play(policy, make_texts(5, 1))
    state = policy.state_dict()
    for key in state:
        for what, changed in (
            (f"without {key!r}", {k: v for k, v in state.items() if k != key}),
            (f"whose {key!r} is misshapen", state | {key: np.zeros((2, 3, 5, 7))}),
        ):
            try:
                make().load_state_dict(changed)
            except PolicyError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"a state {what} must be refused with a PolicyError, got {type(error).__name__}: {error}"
                ) from error


def _merges(make: Make) -> None:
    """What was learnt since the last time can be taken once, and added to another copy."""
    policy, other = make(), make()
    play(policy, make_texts(6, 1))
    delta = _checked(policy.take_delta(), "take_delta")
    fresh = copy.deepcopy(other.state_dict())
    other.merge(copy.deepcopy(delta))
    other.merge({})
    if delta and _differ(policy.state_dict(), fresh):
        assert _differ(other.state_dict(), fresh), "a delta of a policy that learnt changes nothing in another copy"
    before = copy.deepcopy(_checked(other.state_dict(), "state_dict after merge"))
    other.merge(_checked(policy.take_delta(), "take_delta"))
    _same_state(other.state_dict(), before, "take_delta hands out the same twice")
    play(other, make_texts(7, 1, 40))


def _copies(make: Make) -> None:
    """A deep copy goes on like the original, and shares nothing with it."""
    policy = make()
    play(policy, make_texts(8, 1))
    _same_run(copy.deepcopy(policy), policy, "a deep copy decides differently, or shares something with the original")


def _chances(make: Make) -> None:
    """``pmf`` sums to one, agrees with propensities, and asking for it changes nothing."""
    policy = make()
    played = play(policy, make_texts(9, 1))
    if policy.pmf(Context(level="nf4")) is None:
        return
    arms = list(getattr(policy, "arms", ARMS))
    for most in (MAX_GAMMA, 7, 3, 0):
        context = Context(level="nf4", step=len(played), max_gamma=most)
        p = np.asarray(policy.pmf(context))
        assert p.shape == (len(arms),), f"pmf has shape {p.shape}, but there are {len(arms)} arms"
        fine = bool(np.all(p >= 0)) and np.isclose(p.sum(), 1.0)
        assert fine, f"pmf must be chances that sum to 1, got {p.tolist()}"
        assert np.allclose(np.asarray(policy.pmf(context)), p), "asking for pmf twice gives two answers"
        for _ in range(5):
            decision = policy.decide(context)
            # Where even the least arm is more than a step may draft, it is cut to what the step may.
            chance = p[arms.index(decision.gamma)] if decision.gamma in arms else p[0]
            assert np.isclose(decision.propensity, chance), (
                f"gamma {decision.gamma} has propensity {decision.propensity}, but pmf says {chance}"
            )


#: Name of a promise -> its check.
PROMISES: dict[str, Callable[[Make], None]] = {
    "legal answers": _answers,
    "one seed, one run": _repeats,
    "state of arrays": _state,
    "states are copies": _copied,
    "duplicates teach once": _duplicates,
    "late outcomes": _late,
    "restores": _restores,
    "refuses states": _refuses,
    "merges": _merges,
    "deep copies": _copies,
    "pmf": _chances,
}


def _history(make: Make) -> list[tuple[Decision, Outcome]]:
    """Decisions of a fresh copy with their outcomes, none of which it has learnt from."""
    return play(make(), make_texts(10, 1, 60), learn=False)


def _bare(policy: Policy) -> Policy:
    """Return the policy within guards: chance is its affair."""
    while isinstance(policy, Wrapper):
        policy = policy.policy
    return policy


def _same_run(a: Policy, b: Policy, message: str) -> None:
    texts = make_texts(11, 2)
    first, second = ([(o.drafted, o.accepted) for _, o in play(policy, texts)] for policy in (a, b))
    step = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
    assert step is None, f"{message} (step {step}: {first[step or 0][0]} and {second[step or 0][0]} tokens)"


def _same_state(a: State, b: State, message: str) -> None:
    assert a.keys() == b.keys(), f"{message}: keys {sorted(a.keys() ^ b.keys())} are in one of the two only"
    for key in a:
        x, y = np.asarray(a[key], dtype=float), np.asarray(b[key], dtype=float)
        same = x.shape == y.shape and np.allclose(x, y, rtol=1e-9, atol=1e-9)
        assert same, f"{message}: {key!r} differs"


def _differ(a: State, b: State) -> bool:
    try:
        _same_state(a, b, "")
    except AssertionError:
        return True
    return False


def _checked(state: State, where: str) -> State:
    assert isinstance(state, dict), f"{where} must return a dict, got {type(state).__name__}"
    for key, value in state.items():
        assert isinstance(key, str), f"{where} has a key that is no text: {key!r}"
        array = np.asarray(value)
        assert array.dtype.kind in "fiub", (
            f"{where} holds {key!r}, an array of {array.dtype}: only numbers can be saved"
        )
        assert np.isfinite(array).all(), f"{where} holds {key!r}, which is not finite"
    return state
