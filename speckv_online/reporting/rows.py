"""A row of a report's table."""

from __future__ import annotations

from dataclasses import dataclass

from speckv_online.stats import Estimate


@dataclass(frozen=True)
class Row:
    """One policy at one compression level.

    Attributes
    ----------
    tokens_per_second : Estimate
        Σtokens/Σseconds of all steps, prefill left out.
    tokens_per_step, mean_gamma : float
        Tokens produced and tokens drafted, per step.
    acceptance : float
        Accepted over drafted tokens; NaN if nothing was drafted.
    speedup : Estimate or None
        Ratio of goodputs to autoregressive decoding, paired by prompt; None without that baseline.
    decision_microseconds : float
        Median time per step that the policy took to decide and to learn.
    prompts, tokens, steps : int
        What it rests on.
    same_output, compared : int
        How many outputs were compared with autoregressive decoding's, and how many were the same tokens.
    """

    level: str
    policy: str
    tokens_per_second: Estimate
    tokens_per_step: float
    acceptance: float
    mean_gamma: float
    speedup: Estimate | None
    decision_microseconds: float
    prompts: int
    tokens: int
    steps: int
    same_output: int
    compared: int
