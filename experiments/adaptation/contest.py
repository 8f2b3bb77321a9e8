"""Who is compared, and what each of them took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policies.base import Policy
from policies.registry import make_policy

#: Whom the learning policy is compared with: its frozen copy, MLP16 as published, and a start from nothing.
FROZEN, PUBLISHED, COLD = "frozen", "mlp16", "cold"
#: Parts that a stream is divided into.
BINS = 20


class Tally:
    """Adds up the seconds of each prompt, by parts of the stream; all policies have the same tokens to produce.

    Parameters
    ----------
    end : int
        Steps (tokens, of a long stream) to divide up.
    """

    def __init__(self, end: int) -> None:
        self.edges = np.append(np.linspace(0, end, BINS + 1)[:-1], np.inf)
        self.end, self._rows = end, dict[tuple[str, str], dict[str, np.ndarray]]()
        self._tokens = self._repeated = 0

    def add(
        self, met: Sequence[Any], tokens: Sequence[int], sizes: Sequence[int], seconds: Mapping[str, Sequence[float]]
    ) -> None:
        """Add one order of the stream.

        Parameters
        ----------
        met : sequence of (task, prompt)
        tokens, sizes : sequence of int
            Tokens of each, and the steps (tokens, of a long stream) that it took.
        seconds : mapping of str to sequence of float
            What each policy took; the one that learns is ``""``.
        """
        self._tokens += sum(tokens)
        self._repeated += sum(n for i, (key, n) in enumerate(zip(met, tokens, strict=True)) if key in met[:i])
        parts = np.digitize(np.cumsum(sizes) - sizes, self.edges) - 1
        for name, taken in seconds.items():
            for key, part, took in zip(met, parts, taken, strict=True):
                self._rows.setdefault(key, {}).setdefault(name, np.zeros(BINS))[part] += took

    def as_json(self) -> dict[str, Any]:
        """Return (task, prompt) of each prompt, and by policy its seconds in each part."""
        keys = sorted(self._rows)
        seconds = {name: [self._rows[key][name].tolist() for key in keys] for name in self._rows[keys[0]]}
        return {"prompts": keys, "seconds": seconds, "end": self.end, "repeated": self._repeated / self._tokens}


def frozen(spec: str) -> str:
    """Return the spec of a policy's frozen copy."""
    return f"{spec}{',' if ':' in spec else ':'}learn=none"


def settled(spec: str, seed: int, teach: Callable[[Policy], None], **options: Any) -> dict[str, Policy]:
    """Return the learning policy (``""``), its frozen copy and the others.

    Parameters
    ----------
    spec : str
        The policy that learns.
    seed : int
        Seed of them all.
    teach : callable
        Tells a policy its calibration, and lets it meet what is settled on.
    **options
        Options that name the weights to start from.
    """
    teacher, published = make_policy(spec, seed=seed, **options), make_policy(PUBLISHED, seed=seed, **options)
    teach(teacher)
    teach(published)
    found = {"": make_policy(spec, seed=seed, **options), FROZEN: make_policy(frozen(spec), seed=seed, **options)}
    for policy in found.values():
        policy.load_state_dict(teacher.state_dict())
    return found | {PUBLISHED: published, COLD: make_policy(spec, seed=seed, acceptance="none")}
