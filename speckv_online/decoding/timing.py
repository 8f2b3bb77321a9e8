"""Where the time of a step goes: host clock on a CPU, events on a GPU, where launching work is not doing it."""

from __future__ import annotations

from time import perf_counter

import torch


class StepClock:
    """Times drafting and verification of one step without a synchronisation of its own.

    A step calls ``draft`` before it drafts, ``verify`` before it verifies, ``launched`` when the verification is under
    way and ``done`` when its result has reached the host. Only then may the times be read.

    Parameters
    ----------
    device : torch.device
        Where the target is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if device.type == "cuda" else []
        self._times = [0.0, 0.0, 0.0]

    def draft(self) -> None:
        """Drafting begins."""
        self._mark(0)

    def verify(self) -> None:
        """Verification begins."""
        self._mark(1)

    def launched(self) -> None:
        """The verification is under way on the device."""
        if self._events:
            self._mark(2)

    def done(self) -> None:
        """The verification's result is on the host."""
        if not self._events:
            self._mark(2)

    def _mark(self, moment: int) -> None:
        if self._events:
            self._events[moment].record(torch.cuda.current_stream(self._device))
        else:
            self._times[moment] = perf_counter()

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of drafting and of verification."""
        if self._events:
            start, middle, end = self._events
            return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
        start_time, middle_time, end_time = self._times
        return middle_time - start_time, end_time - middle_time
