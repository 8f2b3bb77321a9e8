"""How work on a device is recorded once and launched again: CUDA graphs, and a stand-in for tests of the logic.

A recorded function runs without Python: it reads and writes the same memory each time, and its shapes are fixed. So it
may depend on nothing but tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

#: Uploads that may be under way at once.
_SLOTS = 8
#: Most numbers of an upload.
_NUMBERS = 64


class GraphCapture(Protocol):
    """What the engine needs of a device."""

    def capture(self, body: Callable[[], None], state: torch.Tensor) -> Callable[[], None]:
        """Record a function and return what runs it again; it may have run meanwhile.

        ``state`` is what the function reads and changes; it is afterwards what it was before. Raises ``RuntimeError``
        where the function cannot be recorded.
        """

    def part(self) -> None:
        """Have the graphs to come share no memory with those recorded so far, which may all be gone."""

    def upload(self, numbers: Sequence[int], to: torch.Tensor) -> None:
        """Write some whole numbers to the beginning of a tensor on the device, without waiting for the device."""


class CudaCapture:
    """Records CUDA graphs on one device; they share memory, so they must run one after the other.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # Pinned memory can be copied from in the background, but must not be changed before the copy is done.
        self._slots = [torch.empty(_NUMBERS, dtype=torch.int64, pin_memory=True) for _ in range(_SLOTS)]
        self._copied = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._next = 0

    def capture(self, body: Callable[[], None], state: torch.Tensor) -> Callable[[], None]:
        """See :class:`GraphCapture`."""
        with torch.cuda.device(self.device):
            current, kept = torch.cuda.current_stream(), state.clone()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(2):  # libraries set themselves up in their first calls, which no graph may hold
                        body()
                        state.copy_(kept)
            finally:
                current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    body()
            except BaseException:
                torch.cuda.set_stream(current)  # torch leaves its own stream on where a capture fails
                self.part()  # and goes on counting the pool as being recorded to
                raise
            current.wait_stream(self._stream)
        return graph.replay

    def part(self) -> None:
        """See :class:`GraphCapture`: torch refuses a pool whose last graph is gone, until its memory is given back."""
        self._pool = torch.cuda.graph_pool_handle()

    def upload(self, numbers: Sequence[int], to: torch.Tensor) -> None:
        """See :class:`GraphCapture`."""
        slot, copied = self._slots[self._next], self._copied[self._next]
        self._next = (self._next + 1) % _SLOTS
        if not copied.query():  # its last copy is long done, as a rule
            copied.synchronize()
        slot.numpy()[: len(numbers)] = numbers
        to[: len(numbers)].copy_(slot[: len(numbers)], non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device))


class EagerCapture:
    """A stand-in on any device: it runs the function itself each time.

    It is no substitute for a GPU: it shows that the right function runs at the right time on the right memory.

    Attributes
    ----------
    captured : int
        How many functions were recorded.
    """

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, body: Callable[[], None], state: torch.Tensor) -> Callable[[], None]:
        """See :class:`GraphCapture`."""
        self.captured += 1
        return body

    def part(self) -> None:
        """See :class:`GraphCapture`."""

    def upload(self, numbers: Sequence[int], to: torch.Tensor) -> None:
        """See :class:`GraphCapture`."""
        to[: len(numbers)].copy_(torch.tensor(numbers, dtype=torch.int64))


def capture_for(device: torch.device) -> GraphCapture:
    """Return CUDA graphs on a GPU, the stand-in elsewhere."""
    return CudaCapture(device) if device.type == "cuda" else EagerCapture()
