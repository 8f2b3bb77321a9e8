"""A wrapper that tells which of a policy's methods is being called, so that whoever runs it can name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from policies.base import Policy
from policies.costs.prior import CostPrior
from policies.guards.fault import Wrapper


class Calls(Protocol):
    """Is told of every call: at its start, and when it is over, however it ended."""

    def enter(self, name: str) -> None:
        """A method of that name is about to be called."""

    def leave(self) -> None:
        """The call is over."""


def _told(name: str) -> Callable[..., Any]:
    def call(self: Watched, *arguments: Any) -> Any:
        self.calls.enter(name)
        try:
            return getattr(self.policy, name)(*arguments)
        finally:
            self.calls.leave()

    return call


class Watched(Wrapper):
    """Tells ``calls`` of each call, and changes nothing.

    Parameters
    ----------
    policy : Policy
        The policy to watch.
    calls : Calls
        Who is told.
    """

    def __init__(self, policy: Policy, calls: Calls) -> None:
        super().__init__(policy)
        self.calls = calls

    begin: Any = _told("begin")
    decide: Any = _told("decide")
    proceed: Any = _told("proceed")
    submit: Any = _told("submit")
    learn: Any = _told("learn")
    pmf: Any = _told("pmf")
    state_dict: Any = _told("state_dict")
    load_state_dict: Any = _told("load_state_dict")
    take_delta: Any = _told("take_delta")
    merge: Any = _told("merge")
    info: Any = _told("info")
    _set_costs: Any = _told("set_costs")

    def set_costs(self, level: str, prior: CostPrior) -> None:
        """Tell the policy what is known of a level's times, if it wants to know."""
        if getattr(self.policy, "set_costs", None) is not None:
            self._set_costs(level, prior)
