"""Steps with drafts beside plain steps of about the same time and size: what the fitted costs are checked against.

A machine's speed changes by the minute, and a fit to all steps takes some of that for what drafting takes. A plain step
a few steps away shares the minute. So for each size of batches the latest plain steps are kept, and the latest steps
with drafts, each as its seconds over those of the plain steps before it. Medians leave stalls out.
"""

from __future__ import annotations

from collections import deque
from math import copysign, log, sqrt
from statistics import median

from policies.batches import Forward
from policies.costs.batch_costs import BatchCosts

#: Steps that are kept of each kind.
PLAIN, DRAFTED = 7, 12
#: Standard deviation of one step's ratio, in logarithms, and how many steps the fit is worth beside them.
NOISE, FEW = 0.08, 2.0
#: Plain steps that are measured before anything is drafted, steps with drafts before the next one at least, and steps
#: that may pass until there is one.
FIRST, FEWEST, TRIES = 3, 24, 6
#: Steps of which reading is a larger share than this tell nothing of the others.
READING = 0.3


class Paired:
    """The latest steps of batches of about one size.

    Attributes
    ----------
    plain : deque of (int, float)
        Requests and seconds of plain steps.
    until : float
        Steps with drafts between plain ones.
    """

    def __init__(self) -> None:
        self.plain: deque[tuple[int, float]] = deque(maxlen=PLAIN)
        self._drafted: deque[tuple[Forward, float]] = deque(maxlen=DRAFTED)
        self.until = float(FEWEST)
        self._since = self._tries = 0

    def ask_for_plain(self) -> bool:
        """Return whether the coming step is to draft nothing, so that there is a plain step to compare with."""
        if len(self.plain) < FIRST:
            return True
        if self._since < self.until:
            return False
        self._tries += 1
        if self._tries > TRIES:  # prompts are read all the time
            self._since = self._tries = 0
        return True

    @property
    def drafted(self) -> int:
        """How many steps with drafts are kept."""
        return len(self._drafted)

    def pace(self, costs: BatchCosts) -> float:
        """Return how many times their estimate plain steps take lately."""
        return median(seconds / costs.plain(rows) for rows, seconds in self.plain) if self.plain else 1.0

    def observe(self, forward: Forward, costs: BatchCosts) -> None:
        """Take in a step that did nothing but decode."""
        if not forward.rounds and forward.tokens == forward.rows:
            self.plain.append((forward.rows, forward.seconds))
            self._since = self._tries = 0
            return
        self._since += 1
        if self.plain and costs.draft[3] * forward.read < READING * costs.step(forward):
            usual = self.pace(costs) * costs.plain(forward.rows)
            self._drafted.append((forward, log(forward.seconds / usual)))

    def off(self, costs: BatchCosts) -> float:
        """Return by how much the estimates of steps with drafts, over those of plain ones, are too low: a logarithm.

        Only what noise does not explain counts.
        """
        if not self._drafted:
            return 0.0
        found = median(told - log(costs.step(f) / costs.plain(f.rows)) for f, told in self._drafted)
        count = len(self._drafted)
        return copysign(max(abs(found) - NOISE / sqrt(count), 0.0), found) * count / (count + FEW)
