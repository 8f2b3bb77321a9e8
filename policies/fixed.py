"""The same gamma at every step; gamma 0 is plain autoregressive decoding."""

from __future__ import annotations

from typing import ClassVar

from policies.base import MAX_GAMMA, Context, Decision, Policy, PolicyError


class Fixed(Policy):
    """Always draft ``gamma`` tokens.

    Parameters
    ----------
    gamma : int
        Tokens to draft in each step, 0 to 16.

    Examples
    --------
    >>> Fixed(gamma=4).decide(Context()).gamma
    4
    """

    summary = "always the same gamma (fixed:N, 0 to 16)"
    positional: ClassVar[str] = "gamma"

    def __init__(self, *, gamma: int = 4, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= gamma <= MAX_GAMMA:
            raise PolicyError(f"gamma must be from 0 to {MAX_GAMMA}, got {gamma}")
        self.gamma = gamma

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.gamma, context.max_gamma))


class Autoregressive(Fixed):
    """Never draft: the target alone."""

    summary = "no drafting: the target decodes alone"
    positional: ClassVar[str] = ""

    def __init__(self, *, seed: int = 0, worker: int = 0) -> None:
        super().__init__(gamma=0, seed=seed, worker=worker)
