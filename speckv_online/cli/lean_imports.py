"""Imports transformers without what a command that decodes on one machine never uses.

``transformers.modeling_utils`` imports torch's distributed tensors, its compiler, and scipy for losses of other tasks:
a second and 100 MB. It does without the first and the last where they are missing, so they are hidden meanwhile. Of the
compiler it wants a few decorators. Only a command may do this: the process is its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_HIDDEN = ("scipy", "sklearn", "pandas")
_COMPILER, _INDEX = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
#: What is imported; the rest of transformers comes when it is asked for.
_WANTED = ("modeling_utils", "models.llama.modeling_llama", "models.auto", "generation.utils", "masking_utils")


def import_transformers() -> None:
    """Import transformers' models in the short way; where that fails, all is left to the usual way."""
    if "transformers" in sys.modules:
        return
    try:
        with _hidden():
            for name in _WANTED:
                importlib.import_module(f"transformers.{name}")
    except Exception:  # another version, which needs what was hidden
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


@contextmanager
def _hidden() -> Iterator[None]:
    """Hide what is not used, for a while; what is imported already stays."""
    import torch.distributed

    given = dict[str, ModuleType | None](dict.fromkeys(_HIDDEN))
    if compiler := _COMPILER not in sys.modules:
        given |= {_COMPILER: _decorators(), _INDEX: _index()}
        torch._dynamo = given[_COMPILER]  # type: ignore[assignment]
    put = [name for name in given if name not in sys.modules]
    available = torch.distributed.is_available
    sys.modules.update({name: given[name] for name in put})  # type: ignore[misc]
    if "torch.distributed.tensor" not in sys.modules:
        torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
        for name in put:
            sys.modules.pop(name, None)
        if compiler:
            del torch._dynamo


def _decorators() -> ModuleType:
    """The compiler's decorators, which change nothing while nothing is compiled."""

    def same(function: Any = None, *options: Any, **more: Any) -> Any:
        return (lambda given: given) if function is None else function

    found = ModuleType(_COMPILER)
    found.__path__ = []
    for name in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(found, name, same)
    return found


def _index() -> ModuleType:
    """What masks of flex attention use: the compiler is imported when the first is made."""

    def later(*args: Any) -> Any:
        return importlib.import_module(_INDEX).TransformGetItemToIndex(*args)

    found = ModuleType(_INDEX)
    found.TransformGetItemToIndex = later  # type: ignore[attr-defined]
    return found
