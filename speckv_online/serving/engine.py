"""What an engine tells of itself, of its requests, and of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Engine:
    """What is known of an engine before its first step.

    Attributes
    ----------
    name : str
        Of the engine, its version and its models; a state belongs to one name.
    level : str
        How the target's weights are stored, see :func:`~policies.level_features.level_bits`.
    method : str
        How drafts are made, in the engine's words.
    looks_up : bool
        Whether drafts take no forward of a model.
    most_drafts, most_rows : int
        Most drafts of a request in a step, and most requests.
    pads : bool
        Whether all requests of a step take as long as the one with the most drafts.
    """

    name: str
    level: str
    method: str
    looks_up: bool
    most_drafts: int
    most_rows: int
    pads: bool = False


class Running(NamedTuple):
    """A request that a step may draft for.

    Attributes
    ----------
    id : str
    length : int
        Tokens of its context.
    remaining : int
        Most tokens that it may still produce.
    most : int
        Most drafts that it may have.
    unread : int
        Tokens that a draft model has to read first, beyond the latest one.
    """

    id: str
    length: int
    remaining: int
    most: int
    unread: int = 0


class Verified(NamedTuple):
    """What a request's drafts came to in a step."""

    id: str
    drafted: int
    accepted: int
    produced: int


class EngineStep(NamedTuple):
    """A step of an engine.

    Attributes
    ----------
    verified : sequence of Verified
        Requests that decoded.
    rounds : int
        Drafts that were made in it for each request, where a model makes them.
    forwards, read : int
        Drafted tokens that took a forward of the draft model, and tokens that it read first.
    seconds : float
        Zero for a step that did anything else than decoding, such as reading a prompt.
    """

    verified: Sequence[Verified]
    rounds: int
    forwards: int
    read: int
    seconds: float
