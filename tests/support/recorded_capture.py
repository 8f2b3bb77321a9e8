"""What a CUDA graph does with a function, on a CPU: its operations are recorded once and run again without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

#: Operations that wait for the device: no graph can hold them.
_WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, out))
        return out


class RecordedCapture:
    """Records operations; what Python did around them, its numbers and branches, is fixed from then on."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, body: Callable[[], None], state: torch.Tensor) -> Callable[[], None]:
        kept = state.clone()
        with _Recorder() as recorder:
            body()
        state.copy_(kept)
        self.captured += 1
        tape = recorder.tape

        def replay() -> None:
            self.replayed += 1
            now: dict[int, torch.Tensor] = {}
            for func, args, kwargs, out in tape:
                use = lambda t: now.get(id(t), t)  # noqa: E731
                new = func(*tree_map_only(torch.Tensor, use, args), **tree_map_only(torch.Tensor, use, kwargs))
                was, found = (x if isinstance(x, tuple | list) else (x,) for x in (out, new))
                for old, fresh in zip(was, found, strict=True):
                    if isinstance(old, torch.Tensor) and not any(old is a for a in args):
                        now[id(old)] = fresh

        return replay

    def part(self) -> None:
        """There is no memory to share."""

    def upload(self, numbers: Sequence[int], to: torch.Tensor) -> None:
        to[: len(numbers)].copy_(torch.tensor(numbers, dtype=torch.int64))
