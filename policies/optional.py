"""Libraries that few policies need: imported when one is made, and named in one line where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from policies.base import PolicyError


def require(module: str, library: str) -> Any:
    """Import a module of a library.

    >>> require("math", "math").sqrt(4)
    2.0

    Raises
    ------
    PolicyError
        If it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = f"no module named {error.name}" if isinstance(error, ModuleNotFoundError) else str(error)
        raise PolicyError(f"this needs the library {library} ({why}): pip install {library}") from error
