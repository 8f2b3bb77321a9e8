"""``speckv policies``: every policy with its summary and its options."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from policies.base import PolicyError
from policies.registry import SAFETY, available, options

#: What every policy has, and commands set.
COMMON = ("seed", "worker")
WIDTH = 110


def listing(*, as_json: bool) -> str:
    """Return what the command prints."""
    rows = [(name, summary, _options(name)) for name, summary in available()]
    if as_json:
        return json.dumps([{"name": n, "summary": s, "options": _described(found)} for n, s, found in rows])
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(_lines(rows, width))


def _lines(rows: list[tuple[str, str, dict[str, tuple[str, Any]]]], width: int) -> Iterator[str]:
    indent = " " * (width + 4)
    for name, summary, found in rows:
        yield f"{name:<{width}}  {summary}"
        own = [_usage(key, *value) for key, value in found.items() if key not in SAFETY]
        yield from textwrap.wrap(", ".join(own), WIDTH, initial_indent=indent, subsequent_indent=indent)
    guarded = [name for name, _, found in rows if set(SAFETY) <= set(found)]
    yield "\nOptions as --policy NAME:OPTION=VALUE,OPTION=VALUE; the values above are the defaults, of a|b the first."
    safety = ", ".join(_usage(key, "", default) for key, (_, default) in SAFETY.items())
    yield from textwrap.wrap(f"The safety guard's options, of {', '.join(guarded)}: {safety}", WIDTH)


def _options(name: str) -> dict[str, tuple[str, Any]]:
    try:
        return {key: found for key, found in options(name).items() if key not in COMMON}
    except PolicyError:  # the summary says why
        return {}


def _described(found: dict[str, tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: {"type": kind, "default": _plain(default)} for key, (kind, default) in found.items()}


def _usage(key: str, kind: str, default: Any) -> str:
    if kind.startswith("one of "):
        choices = kind.removeprefix("one of ").split(", ")
        return f"{key}=" + "|".join(sorted(choices, key=lambda choice: choice != default))
    if isinstance(default, bool):
        return f"{key}={'on' if default else 'off'}"
    if isinstance(default, tuple):
        return f"{key}={'/'.join(map(str, default))}"
    if isinstance(default, float):
        return f"{key}={default:g}"
    plain = _plain(default)
    return f"{key}=…" if plain in (None, "") else f"{key}={plain}"


def _plain(default: Any) -> Any:
    """Return a default as JSON can hold it; None for one that has no value of its own."""
    if isinstance(default, tuple):
        return list(default)
    return default if isinstance(default, bool | int | float | str) else None
