"""Policies by name: spec strings, their options, and policies from other packages.

A spec string names a policy and sets its options:

- ``fixed:4``: the one positional option of a policy, for policies that declare one (``positional``);
- ``online:strength=200,explore=ucb``: options by name, separated by commas; both forms mix (``fixed:4,seed=1``);
- ``mypkg.mymodule:MyPolicy`` or ``mypkg.mymodule:MyPolicy:alpha=0.5``: any importable :class:`~policies.base.Policy`;
- names that other packages register in the entry-point group ``speckv_online.policies``.

Options are the keyword parameters of the policy's constructor, and their annotations say what is accepted: ``int``,
``float``, ``bool`` (``on``/``off``), ``str``, ``Literal[...]``, and ``tuple[int, ...]`` written ``0/2/4``.

Learned policies (``guarded``) come wrapped in :class:`~policies.guards.safety.SafetyGuard`, and take its options too:
``safety=off`` leaves it out, ``safety_gamma`` and ``safety_epsilon`` set it, ``naps=off`` keeps it awake.

To add a policy, write one file and add one line to :data:`BUILTIN`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from importlib.metadata import EntryPoint, entry_points
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from policies.base import Policy, PolicyError, reason
from policies.guards.safety import SafetyGuard

GROUP = "speckv_online.policies"

BUILTIN: dict[str, str] = {
    "adaedl": "policies.baselines.adaedl:AdaEdl",
    "autoregressive": "policies.fixed:Autoregressive",
    "best-drafter": "policies.learned.best_drafter:BestDrafter",
    "exp3spec": "policies.baselines.banditspec:Exp3Spec",
    "fixed": "policies.fixed:Fixed",
    "goodput": "policies.learned.goodput:Goodput",
    "hf-confidence": "policies.baselines.engines.hf:Confidence",
    "hf-heuristic": "policies.baselines.engines.hf:Heuristic",
    "ik-autotune": "policies.baselines.engines.ik_llama:IkAutotune",
    "leviathan": "policies.baselines.leviathan:Leviathan",
    "lints": "policies.learned.linear:LinTs",
    "linucb": "policies.learned.linear:LinUcb",
    "llamacpp": "policies.baselines.engines.llamacpp:LlamaCpp",
    "mlp16": "policies.learned.mlp16:Mlp16Policy",
    "online": "policies.learned.online:Online",
    "online-sgd": "policies.learned.online_sgd:OnlineSgd",
    "onnx-genai": "policies.baselines.engines.onnx_genai:OnnxGenAi",
    "river": "policies.baselines.river_adapter:River",
    "sglang": "policies.baselines.engines.sglang:SgLang",
    "specdecpp": "policies.baselines.specdecpp:SpecDecPlusPlus",
    "svip": "policies.baselines.svip:Svip",
    "tensorrt-gate": "policies.baselines.engines.tensorrt_llm:TensorRtGate",
    "ucbspec": "policies.baselines.banditspec:UcbSpec",
    "vllm": "policies.baselines.engines.vllm:VllmAdaptive",
    "vllm-table": "policies.baselines.engines.vllm_table:VllmTable",
}

#: Options of every guarded policy: type and default.
SAFETY: dict[str, tuple[Any, Any]] = {
    "safety": (bool, True),
    "safety_gamma": (int, 4),
    "safety_epsilon": (float, 0.05),
    "naps": (bool, True),
}

_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def make_policy(spec: str, **defaults: Any) -> Policy:
    """Build the policy that a spec string describes.

    Parameters
    ----------
    spec : str
        See the module's docstring.
    **defaults
        Options used where the spec does not set them, e.g. ``seed``, ``worker``, ``weights``; those that the policy
        does not have are left out.

    Raises
    ------
    PolicyError
        For an unknown name or option, or a value of the wrong type or out of range.
    """
    name, cls, text = _resolve(spec)
    hints = {key: hint for key, (hint, _) in _options(cls).items()}
    options = {key: value for key, value in defaults.items() if key in hints}
    options |= _parse(name, cls, text, hints)
    safety = {key: options.pop(key, default) for key, (_, default) in SAFETY.items()}
    try:
        policy = cls(**options)
        if not (getattr(cls, "guarded", False) and safety["safety"]):
            return policy
        return SafetyGuard(policy, safety["safety_gamma"], safety["safety_epsilon"], naps=safety["naps"])
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None
    except Exception as error:  # anybody's constructor
        raise PolicyError(f"{name}: cannot be built from {options}: {type(error).__name__}: {reason(error)}") from error


def available() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every registered policy, sorted by name; of one that will not load, why."""
    rows = [(name, _load(target).summary) for name, target in BUILTIN.items()]
    for name, point in _plugins().items():
        if name not in BUILTIN:
            try:
                rows.append((name, _load(point.value).summary))
            except PolicyError as error:
                package = f" (of the package {point.dist.name})" if point.dist is not None else ""
                rows.append((name, f"does not load{package}: {error}"))
    return sorted(rows)


def options(name: str) -> dict[str, tuple[str, Any]]:
    """Return option -> (type, default) of a registered policy, for help texts."""
    _, cls, _ = _resolve(name)
    return {key: (_spell(hint), default) for key, (hint, default) in _options(cls).items()}


def _resolve(spec: str) -> tuple[str, type[Policy], str]:
    """Split a spec into (name, class, options text)."""
    name, _, rest = spec.strip().partition(":")
    plugins = _plugins()
    if name in BUILTIN:
        return name, _load(BUILTIN[name]), rest
    if name in plugins:
        return name, _load(plugins[name].value), rest
    attribute, _, options = rest.partition(":")
    if name.endswith(".py"):
        module = PurePath(name).stem
        raise PolicyError(
            f"'{name}' is a file: name its module, {module}:{attribute or 'CLASS'}, from the file's folder"
        )
    if attribute.isidentifier() and all(part.isidentifier() for part in name.split(".")):
        try:
            return f"{name}:{attribute}", _load(f"{name}:{attribute}"), options
        except PolicyError as error:
            missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
            if "." in name or missing != name:  # a module that is there but will not load is no misspelt policy
                raise
    known = sorted({*BUILTIN, *plugins})
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}, or give MODULE:CLASS"
    raise PolicyError(f"unknown policy '{name}': {hint}")


def _load(target: str) -> type[Policy]:
    """Import ``module:Class``."""
    module, _, attribute = target.partition(":")
    if not attribute:
        raise PolicyError(f"cannot import policy {target}: it names no class, as in MODULE:CLASS")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PolicyError(f"cannot import policy {target}: no module named '{error.name}'") from error
    except (AttributeError, ImportError, SyntaxError) as error:
        raise PolicyError(f"cannot import policy {target}: {error}") from error
    except (Exception, SystemExit) as error:  # anybody's module
        raise PolicyError(f"cannot import policy {target}: it raised {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{target} is not a subclass of policies.base.Policy")
    return found


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _options(cls: type[Policy]) -> dict[str, tuple[Any, Any]]:
    """Return option -> (type, default) of a constructor, base classes included where it passes ``**kwargs`` on."""
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
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD):
                found.setdefault(p.name, (hints.get(p.name, str), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found | SAFETY if getattr(cls, "guarded", False) else found


def _parse(name: str, cls: type[Policy], text: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Turn the text after the name into constructor options."""
    parsed: dict[str, Any] = {}
    for i, item in enumerate(text.split(",") if text else []):
        key, equals, value = item.partition("=")
        key, value = key.strip(), value.strip()
        if not equals:
            positional = getattr(cls, "positional", "")
            if i or not positional:
                usage = f"{positional} as its first option, the others" if positional else "its options"
                raise PolicyError(f"{name}: '{item}' is not of the form option=value; the policy takes {usage} by name")
            key, value = positional, key
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(hints)}"
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
        raise PolicyError(f"{label} must be {_spell(hint)}, got '{value}'") from None


def _spell(hint: Any) -> str:
    """Name a type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "whole numbers separated by slashes (0/2/4)"
    return {int: "a whole number", float: "a number", bool: "on or off"}.get(hint, "text")
