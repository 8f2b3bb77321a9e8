"""How many times the estimates the machine's times are, now and lately, and whether it is another machine by now."""

from __future__ import annotations

#: Weights of the latest step in the pace now, and lately.
NOW, LATELY = 0.12, 0.014
#: Where the pace stays outside of these bounds for so many steps, the machine is another one, or its load.
SAME, STEPS = (0.85, 1.18), 48
#: Where it is told that the machine is another one, so many steps show its pace.
TOLD = 6
#: So many drafts in those steps tell of the draft's pace; with fewer, it is taken for the target's.
DRAFTS = 4


class Means:
    """Means of how far times are off their estimates.

    Parameters
    ----------
    usual : float
        What both start from.

    Attributes
    ----------
    now, lately : float
        Over the last few steps, and over many.
    steps : int
        How many steps told of it.
    """

    __slots__ = ("lately", "now", "steps")

    def __init__(self, usual: float = 0.0) -> None:
        self.now, self.lately, self.steps = usual, usual, 0

    def note(self, off: float, heard: int = 0) -> None:
        """Take in a step; of a machine that began anew, it is the ``heard``-th."""
        self.steps += 1
        even = 1.0 / self.steps
        self.now += (1.0 / heard if heard else NOW if even < NOW else even) * (off - self.now)
        self.lately += (LATELY if even < LATELY else even) * (off - self.lately)


class Pace(Means):
    """The pace of one level's steps: a verification's time over its estimate.

    Attributes
    ----------
    draft : float
        The same of a draft, over the last few.
    told : bool
        Whether another machine was announced, and its pace is being found.
    """

    __slots__ = ("_drafts", "_heard", "_off", "_off_draft", "_run", "_run_draft", "draft", "told")

    def __init__(self) -> None:
        super().__init__(1.0)
        self.draft, self.told = 1.0, False
        self._off = self._off_draft = self._run = self._run_draft = self._drafts = self._heard = 0

    def another_machine(self) -> None:
        """Begin anew: from the next step on the machine is another one. A few steps show its pace."""
        self.told, self._heard, self._drafts, self.now, self.draft = True, 0, 0, 1.0, 1.0

    @property
    def found(self) -> bool:
        """Whether the pace of an announced machine is known by now: :meth:`change` has it."""
        return self.told and self._heard >= TOLD

    def compare(self, verify: float, expected: float, draft: float, drafting: float) -> None:
        """Note what a verification and a draft took, and were expected to; where nothing was, they tell nothing."""
        if verify > 0.0:
            self.verified(verify / expected)
        if drafting > 0.0:
            self.drafted(draft / drafting)

    def verified(self, ratio: float) -> None:
        """Note how many times its estimate a verification took."""
        if self.told:
            self._heard += 1
            self.note(ratio if ratio < 3.0 else 3.0, self._heard)
        else:
            self.note(ratio)
        off = self._side(self.now)
        if off and off == self._off:
            self._run += 1
        else:
            self._off, self._run = off, 0
            if not self.told:
                self._drafts = 0

    def drafted(self, ratio: float) -> None:
        """Note how many times its estimate a draft took."""
        self._drafts += 1
        weight = 1.0 / self._drafts if self.told else NOW
        self.draft += weight * ((ratio if ratio < 3.0 else 3.0) - self.draft)
        off = self._side(self.draft)
        if off and off == self._off_draft:
            self._run_draft += 1
        else:
            self._off_draft, self._run_draft = off, 0

    def change(self) -> tuple[float, float] | None:
        """Return by how much to multiply earlier times of the target and of the draft, and begin anew; None to go on.

        A verification alone may be off for its context, so drafts have to tell of a change of both models too.
        """
        both = self._run >= STEPS and (self._drafts < DRAFTS or self._off_draft == self._off)
        if self.told:
            if not self.found:
                return None
            target, draft = self.now, self.draft if self._drafts else self.now
            self.now = self.lately = 1.0
            self.told = False
        elif both:
            target, draft = self.now, self.draft if self._drafts >= DRAFTS else self.now
            self.now = self.lately = 1.0
        elif self._run_draft >= STEPS:
            target, draft = 1.0, self.draft
        else:
            return None
        self.draft, self._off, self._off_draft = 1.0, 0, 0
        self._run = self._run_draft = self._drafts = 0
        return target, draft

    @staticmethod
    def _side(pace: float) -> int:
        return 1 if pace > SAME[1] else -1 if pace < SAME[0] else 0
