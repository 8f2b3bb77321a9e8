"""Models without weights: nothing is initialised only to be overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.initialization import no_init_weights


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules with parameters on the meta device, and buffers as they are.

    The device is not set for all that is done meanwhile: torch then computes rotary frequencies on the meta device too,
    and imports its compiler for that, which takes half a second.
    """
    from accelerate import init_empty_weights  # not there beside vLLM, where no model is loaded by us

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield
