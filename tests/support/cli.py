"""The command ``speckv``, as tests call it: its exit code, output and error output."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]
