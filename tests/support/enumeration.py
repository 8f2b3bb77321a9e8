"""Every way that sampled decoding can go, each with its exact probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from speckv_online.modeling.sampling import Sampler

Result = TypeVar("Result")


class Tape:
    """What chance chose in one run: the first choices are given, all later ones take the first that can be."""

    def __init__(self, given: Sequence[int]) -> None:
        self.given, self.taken, self.most, self.probability = list(given), list[int](), list[list[int]](), 1.0

    def choose(self, weights: Sequence[float]) -> int:
        can = [i for i, w in enumerate(weights) if w > 0.0]
        at = len(self.taken)
        choice = self.given[at] if at < len(self.given) else can[0]
        self.taken.append(choice)
        self.most.append(can)
        self.probability *= weights[choice] / sum(weights)
        return choice


class Enumerated(Sampler):
    """A sampler whose two kinds of chance, a token that is drawn and a draft that is accepted, come off a tape."""

    tape: Tape

    def draw(self, probabilities: torch.Tensor) -> int:
        return self.tape.choose(probabilities.double().tolist())

    def accepts(self, p: float, q: float) -> bool:
        accepted = min(1.0, p / q)
        return bool(self.tape.choose([1.0 - accepted, accepted]))


def every_way(run: Callable[[Tape], Result]) -> Iterator[tuple[Result, float]]:
    """Yield what each way comes to, and its probability."""
    given: list[int] = []
    while True:
        tape = Tape(given)
        yield run(tape), tape.probability
        taken, most = tape.taken, tape.most
        while taken and taken[-1] == most[len(taken) - 1][-1]:
            taken.pop()
        if not taken:
            return
        can = most[len(taken) - 1]
        given = [*taken[:-1], can[can.index(taken[-1]) + 1]]
