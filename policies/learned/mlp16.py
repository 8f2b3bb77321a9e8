"""`mlp16`: SpecKV's MLP16, frozen, as published (arXiv 2605.02888): it reads the signals of an earlier step."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from policies.acceptance.mlp16 import Mlp16, resolve_weights
from policies.base import Context, Decision, PolicyError
from policies.costs.cost_aware import CostAware


class Mlp16Policy(CostAware):
    """Play the arm that the frozen MLP16 likes best.

    Parameters
    ----------
    weights : str or Weights
        An npz file; the shipped weights by default.
    objective : {'tokens_per_second', 'tokens_per_step'}
        ``tokens_per_step`` is the paper's: the argmax of predicted acceptance * gamma + 1. ``tokens_per_second``
        takes the price of a step off that, in tokens: lambda * T(gamma).
    arms : tuple of int
        The gammas to choose from.
    read : {'lagged', 'step'}
        What MLP16 reads: the signals of an earlier step, as published, or those of the step itself. ``mlp16:read=step``
        is ``online:learn=costs``: `online` that never learns acceptance (:func:`~policies.registry.make_policy`).
    """

    summary = "the pretrained MLP16, frozen (objective=tokens_per_second|tokens_per_step)"
    positional: ClassVar[str] = "objective"

    def __init__(self, *, weights: str = "", read: Literal["lagged", "step"] = "lagged", **options: Any) -> None:
        super().__init__(**options)
        if read != "lagged":
            raise PolicyError(f"read must be lagged, or step in a spec, got '{read}'")
        self.net = Mlp16(resolve_weights(weights), self.arms)

    def decide(self, context: Context) -> Decision:
        value = self.net.tokens(context.level, self.net.read(context))
        if self.timed:
            np.subtract(value, self.costs.level(context.level).arm_price, value)
        gamma = self.arms[int(value[: self.legal(context)].argmax())]
        return Decision(self.new_id(), min(gamma, context.max_gamma))
