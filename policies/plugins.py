"""What spec strings are read with: plug-ins of other packages by name, and options by a constructor's annotations."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import types
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from policies.base import PolicyError, reason

_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def plugins(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages register in an entry-point group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_object(target: str, kind: str) -> Any:
    """Import ``module:Class``; raises :class:`PolicyError` with one line if that fails."""
    module, _, attribute = target.partition(":")
    if not attribute:
        raise PolicyError(f"cannot import {kind} {target}: it names no class, as in MODULE:CLASS")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PolicyError(f"cannot import {kind} {target}: no module named '{error.name}'") from error
    except (AttributeError, ImportError, SyntaxError) as error:
        raise PolicyError(f"cannot import {kind} {target}: {error}") from error
    except (Exception, SystemExit) as error:  # anybody's module
        raise PolicyError(f"cannot import {kind} {target}: it raised {type(error).__name__}: {error}") from error


def constructor_options(cls: type, leave_out: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return option -> (type, default) of a constructor, base classes included where it passes ``**kwargs`` on.

    >>> class Drafter:
    ...     def __init__(self, model: object, *, width: int = 3) -> None: ...
    >>> constructor_options(Drafter, leave_out=["model"])
    {'width': (<class 'int'>, 3)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        init = vars(base)["__init__"]
        try:
            hints = get_type_hints(init)
        except Exception as error:
            raise PolicyError(f"cannot read the options of {base.__name__}: {reason(error)}") from error
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in leave_out:
                found.setdefault(p.name, (hints.get(p.name, str), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


log = logging.getLogger(__name__)
#: Options that had another name before version 0.2.
FORMER = {"naps": "sleeps", "draft_min": "n_min", "draft_max": "n_max"}


def parse_options(name: str, text: str, hints: dict[str, Any], positional: str = "") -> dict[str, Any]:
    """Turn the text after a name into constructor options.

    >>> parse_options("fixed", "4,seed=1", {"gamma": int, "seed": int}, positional="gamma")
    {'gamma': 4, 'seed': 1}

    Parameters
    ----------
    name : str
        Whose options they are, for messages.
    text : str
        Options, separated by commas.
    hints : dict
        Option -> annotated type.
    positional : str
        The option that may come first without its name.
    """
    parsed: dict[str, Any] = {}
    for i, item in enumerate(text.split(",") if text else []):
        key, equals, value = item.partition("=")
        key, value = key.strip(), value.strip()
        if not equals:
            if i or not positional:
                usage = f"{positional} as its first option, the others" if positional else "its options"
                raise PolicyError(f"{name}: '{item}' is not of the form option=value; it takes {usage} by name")
            key, value = positional, key
        if key not in hints and FORMER.get(key) in hints:
            log.warning("%s: option '%s' is called '%s' now", name, key, FORMER[key])
            key = FORMER[key]
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(hints) or 'none'}"
            raise PolicyError(f"{name}: unknown option '{key}': {hint}")
        if key in parsed:
            raise PolicyError(f"{name}: option {key} is given twice")
        parsed[key] = _convert(f"{name}: {key}", value, hints[key])
    return parsed


def _convert(label: str, value: str, hint: Any) -> Any:
    """Convert an option's text to the annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        hint = next(arg for arg in args if arg is not type(None))
        origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise PolicyError(f"{label} must be one of {', '.join(map(str, args))}, got '{value}'")
    if hint is bool:
        if value.lower() in _SWITCH:
            return _SWITCH[value.lower()]
        raise PolicyError(f"{label} must be on or off, got '{value}'")
    try:
        if origin is tuple:
            return tuple(args[0](part) for part in value.split("/"))
        return hint(value) if hint in (int, float) else value
    except ValueError:
        raise PolicyError(f"{label} must be {spell(hint)}, got '{value}'") from None


def spell(hint: Any) -> str:
    """Name a type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "whole numbers separated by slashes (0/2/4)"
    return {int: "a whole number", float: "a number", bool: "on or off"}.get(hint, "text")
