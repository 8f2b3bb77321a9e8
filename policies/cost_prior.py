"""What is known of a compression level's times before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from policies.base import MAX_GAMMA, PolicyError

#: Numbers of tokens that a verification may have: 1 to 17.
WIDTHS = MAX_GAMMA + 1
#: Far above any time: a whole number may be finite and still be too large for a float.
MOST = 1e300


@dataclass(frozen=True, slots=True)
class CostPrior:
    """What a calibration, or a cost file, says about one compression level.

    Attributes
    ----------
    draft_seconds : float
        t_d, seconds to draft one more token.
    verify_seconds : tuple of float
        T_v(w) for w = 1, 2, ...; a shorter table goes on at its last rate of growth (flat for one entry) up
        to width 17.
    overhead_seconds : float
        t_0, what a step takes besides drafting and verifying.
    context_seconds : float
        Growth of T_v per token of context.
    context_length : float
        Context length at which the table holds.
    weight : float
        How many observed steps the table is worth.
    catch_up_seconds : float
        Seconds per context token that the draft has to read before its first draft of a step, beyond the latest one:
        the prompt, and what was produced in steps that drafted nothing.
    first_draft_seconds : float
        What the first drafted token of a step takes on top of t_d: the target's forward has emptied the caches.
    """

    draft_seconds: float
    verify_seconds: tuple[float, ...]
    overhead_seconds: float = 0.0
    context_seconds: float = 0.0
    context_length: float = 0.0
    weight: float = 20.0
    catch_up_seconds: float = 0.0
    first_draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        others = [v for name, v in asdict(self).items() if name != "verify_seconds"]
        times = (*others, *self.verify_seconds)
        positive = (*self.verify_seconds, self.weight)
        if not self.verify_seconds or not all(0 <= t < MOST for t in times) or min(positive) <= 0:
            wanted = "finite numbers, none below zero, and verify times and a weight above zero"
            raise PolicyError(f"cost prior needs {wanted}: {self}")

    def table(self) -> np.ndarray:
        """T_v for widths 1 to 17, shape (17,)."""
        given = np.asarray(self.verify_seconds, dtype=float)[:WIDTHS]
        slope = max(given[-1] - given[-2], 0.0) if len(given) > 1 else 0.0
        extra = given[-1] + slope * np.arange(1, WIDTHS - len(given) + 1)
        return np.concatenate([given, extra])


#: Used until something better is known; its scale yields to the first measurements.
VAGUE = CostPrior(0.010, (0.050, 0.0515), weight=0.01)
