"""The rows of a trace that a lookup is judged by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Plain numbers, which Python reads faster than arrays of few entries; fields as in :class:`Trace`."""

    tokens: list[int]
    drafts: list[list[int]]
    accepted: list[int]
    available: list[int]
    signals: np.ndarray
    lookups: list[list[float]]
    forwards: list[list[int]]
    read: list[list[int]]
