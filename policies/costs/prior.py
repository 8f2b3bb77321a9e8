"""What is known of a compression level's times before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from policies.base import MAX_GAMMA, PolicyError

#: Numbers of tokens that a verification may have: 1 to 17.
WIDTHS = MAX_GAMMA + 1
#: Seconds that no part of a step takes, and that every verification does.
MOST, LEAST = 1e9, 1e-12


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
        numbers = asdict(self)
        verify = numbers.pop("verify_seconds")
        if not isinstance(verify, list | tuple) or not verify:
            raise PolicyError(f"a cost prior's verify_seconds must be a list of numbers, got {verify!r}")
        for name, value, least in (
            *((name, value, LEAST if name == "weight" else 0.0) for name, value in numbers.items()),
            *(("verify_seconds", value, LEAST) for value in verify),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not least <= value < MOST:
                allowed = f"at least {least:g} and below {MOST:g}"
                raise PolicyError(f"a cost prior's {name} must be a number, {allowed}, got {value!r:.40}")

    def table(self) -> np.ndarray:
        """T_v for widths 1 to 17, shape (17,)."""
        given = np.asarray(self.verify_seconds, dtype=float)[:WIDTHS]
        slope = max(given[-1] - given[-2], 0.0) if len(given) > 1 else 0.0
        extra = given[-1] + slope * np.arange(1, WIDTHS - len(given) + 1)
        return np.concatenate([given, extra])


#: Used until something better is known; its scale yields to the first measurements.
VAGUE = CostPrior(0.010, (0.050, 0.0515), weight=0.01)
