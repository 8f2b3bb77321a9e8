"""What is to be decoded, in which order, and what is left of it: the same for every runner and number of workers.

A *block* is one prompt at one level in one seeded order. All policies decode it one right after the other, on one
worker, so that a drift of the machine hits all alike; they take turns in going first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.runtime.call_watch import PolicyGivenUp
from experiments.runtime.schedule import Schedule
from experiments.runtime.settings import CompareConfig
from speckv_online.io.prompts import Prompt
from speckv_online.io.run_directory import StepWriter, Unit
from speckv_online.io.step_records import StepRecord


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt at one level in one seeded order: a unit for each policy, and where the prompt is in the list."""

    units: tuple[Unit, ...]
    prompt: int


def blocks(config: CompareConfig, prompts: Sequence[Prompt], level: str) -> list[Block]:
    """Return the blocks of a level: seeded orders of the prompts, within a prompt the policies, rotated."""
    found = []
    for seed in range(config.seed, config.seed + config.orders):
        for turn, p in enumerate(np.random.default_rng(seed).permutation(len(prompts)).tolist()):
            k, prompt = turn % len(config.policies), prompts[p]
            policies = config.policies[k:] + config.policies[:k]
            units = tuple(Unit(level, policy, prompt.id, prompt.task, seed) for policy in policies)
            found.append(Block(units, p))
    return found


class Work:
    """The queue of a level's blocks: each is dealt out to one worker at a time, finished units are left out.

    Parameters
    ----------
    blocks : sequence of Block
        All blocks of the level.
    writer : StepWriter
        The level's records; units that they hold are done.
    given_up : mapping, optional
        Policies whose units are left out from when they are in it; it may change.
    """

    def __init__(
        self, blocks: Sequence[Block], writer: StepWriter, given_up: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.writer, self.given_up = writer, given_up
        self.units = [unit for block in blocks for unit in block.units]
        self.total = len(self.units)
        self._waiting = deque(blocks)

    @property
    def done(self) -> int:
        """Number of finished units."""
        return len(self.writer.done)

    @property
    def left(self) -> int:
        """Number of units that are still to be decoded."""
        return sum(map(self.wanted, self.units))

    def wanted(self, unit: Unit) -> bool:
        """Whether a unit is still to be decoded."""
        return unit.key not in self.writer.done and unit.policy not in self.given_up

    def take(self) -> deque[tuple[Unit, int]]:
        """Return the units of the next block that are not done yet, with their prompt's number; empty at the end."""
        while self._waiting:
            block = self._waiting.popleft()
            if left := deque((unit, block.prompt) for unit in block.units if self.wanted(unit)):
                return left
        return deque()

    def record(self, unit: Unit, steps: Sequence[StepRecord], facts: Mapping[str, Any], seconds: float) -> Progress:
        """Write a finished unit down; raises :class:`~speckv_online.errors.UserError` if the disk is full."""
        self.writer.write(unit, steps, facts)
        return Progress(unit, self.done, self.total, sum(s.produced for s in steps), seconds)

    def give_back(self, units: Sequence[tuple[Unit, int]]) -> None:
        """Put what a worker could not finish in front of the queue."""
        if units:
            self._waiting.appendleft(Block(tuple(unit for unit, _ in units), units[0][1]))

    def __bool__(self) -> bool:
        """True while there are units that nobody has taken."""
        return any(self.wanted(unit) for block in self._waiting for unit in block.units)


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished unit, as a progress display wants it."""

    unit: Unit
    done: int
    total: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a level.

    ``waiting`` (for cores), ``loading``, ``ready`` (facts), ``unit`` (a Progress), ``finished`` (facts), ``trouble``
    (text: something that the run gets over by itself), ``given up`` (error: a policy that does not go on, at any level)
    or ``failed`` (error: the level does not go on).
    """

    level: str
    kind: str
    worker: int = 0
    facts: dict[str, Any] | None = None
    progress: Progress | None = None
    text: str = ""
    error: BaseException | None = None


@dataclass(frozen=True)
class Job:
    """What is to be run: settings, prompts, run directory, and what workers may use."""

    config: CompareConfig
    prompts: Sequence[Prompt]
    out: Path
    schedule: Schedule
    #: Policies whose units are not decoded any more, and why.
    given_up: dict[str, str] = field(default_factory=dict)

    def give_up(self, level: str, worker: int, policy: str, reason: str) -> Iterator[Event]:
        """Leave a policy's units out from now on, and say so once."""
        if policy not in self.given_up:
            self.given_up[policy] = reason
            error = PolicyGivenUp(policy, reason)
            yield Event(level, "given up", worker, text=str(error), error=error)

    def work(self, level: str) -> Work:
        """Return a level's queue, and open its records."""
        writer = StepWriter(self.out / f"steps-{level}.jsonl")
        return Work(blocks(self.config, self.prompts, level), writer, self.given_up)
