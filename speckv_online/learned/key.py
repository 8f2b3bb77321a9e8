"""What a state belongs to. Nothing heavy is imported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

#: Version of the files; those of another version are never read.
FORMAT = 1


@dataclass(frozen=True)
class Key:
    """Under what a state is kept. A state is used only where all of it is the same.

    Attributes
    ----------
    policy : str
        The policy's spec in its canonical form, or the name that its owner gave it.
    target, draft : str
        Fingerprints of the weights; ``none`` without a draft.
    level : str
        Compression level of the target.
    rows : int
        Sequences decoded at once, rounded up to a power of two.
    device : str
        Name of the GPU, or of the processor with its threads.
    engine : str
        What runs the target, as that sets the seconds.
    """

    policy: str
    target: str
    draft: str
    level: str
    rows: int
    device: str
    engine: str

    @property
    def name(self) -> str:
        """Name of the state in lists, and of its file."""
        text = json.dumps([FORMAT, *asdict(self).values()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(rows: int) -> int:
    """Return the number of rows that a state is kept for: the next power of two.

    >>> [rounded(n) for n in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (rows - 1).bit_length()
