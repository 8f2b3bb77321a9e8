"""Policies by name: spec strings, their options, and policies from other packages.

A spec string names a policy and sets its options:

- ``fixed:4``: the one positional option of a policy, for policies that declare one (``positional``);
- ``online:strength=200,lookups=off``: options by name, separated by commas; both forms mix (``fixed:4,seed=1``);
- ``mypkg.mymodule:MyPolicy`` or ``mypkg.mymodule:MyPolicy:alpha=0.5``: any importable :class:`~policies.base.Policy`;
- names that other packages register in the entry-point group ``speckv_online.policies``.

Options are the keyword parameters of the policy's constructor, and their annotations say what is accepted: ``int``,
``float``, ``bool`` (``on``/``off``), ``str``, ``Literal[...]``, and ``tuple[int, ...]`` written ``0/2/4``.

Learned policies (``guarded``) come wrapped in :class:`~policies.guards.safety.SafetyGuard`, and take its options too:
``safety=off`` leaves it out, ``safety_gamma`` and ``safety_epsilon`` set it, ``sleeps=off`` keeps it awake.

To add a policy, write one file and add one line to :data:`BUILTIN`.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import PurePath
from typing import Any

from policies.base import Policy, PolicyError, reason
from policies.guards.safety import SafetyGuard
from policies.plugins import constructor_options, load_object, parse_options, plugins, spell

log = logging.getLogger(__name__)
GROUP = "speckv_online.policies"

BUILTIN: dict[str, str] = {
    "adaedl": "policies.baselines.adaedl:AdaEdl",
    "autoregressive": "policies.fixed:Autoregressive",
    "exp3spec": "policies.baselines.banditspec:Exp3Spec",
    "fixed": "policies.fixed:Fixed",
    "hf-confidence": "policies.baselines.engines.hf:Confidence",
    "hf-heuristic": "policies.baselines.engines.hf:Heuristic",
    "ik-autotune": "policies.baselines.engines.ik_llama:IkAutotune",
    "leviathan": "policies.baselines.leviathan:Leviathan",
    "lints": "policies.learned.linear:LinTs",
    "linucb": "policies.learned.linear:LinUcb",
    "llamacpp": "policies.baselines.engines.llamacpp:LlamaCpp",
    "mlp16": "policies.learned.mlp16:Mlp16Policy",
    "nightjar": "policies.baselines.nightjar:Nightjar",
    "online": "policies.learned.online:Online",
    "onnx-genai": "policies.baselines.engines.onnx_genai:OnnxGenAi",
    "river": "policies.baselines.river_adapter:River",
    "sglang": "policies.baselines.engines.sglang:SgLang",
    "specdecpp": "policies.baselines.specdecpp:SpecDecPlusPlus",
    "svip": "policies.baselines.svip:Svip",
    "tapout": "policies.baselines.tapout:TapOut",
    "tensorrt-gate": "policies.baselines.engines.tensorrt_llm:TensorRtGate",
    "ucbspec": "policies.baselines.banditspec:UcbSpec",
    "vllm": "policies.baselines.engines.vllm:VllmAdaptive",
    "vllm-table": "policies.baselines.engines.vllm_table:VllmTable",
}

#: Other names: a policy's, or a policy's with one of its options; the other options stay.
RENAMED = {"goodput": "online", "mlp16:read=step": "online:learn=costs"}

#: Options of every guarded policy: type and default.
SAFETY: dict[str, tuple[Any, Any]] = {
    "safety": (bool, True),
    "safety_gamma": (int, 4),
    "safety_epsilon": (float, 0.05),
    "sleeps": (bool, True),
}


#: Other names that were named once.
_told: set[str] = set()


def make_policy(spec: str, *, bare: bool = False, **defaults: Any) -> Policy:
    """Build the policy that a spec string describes.

    >>> from policies.base import Context
    >>> make_policy("fixed:4").decide(Context()).gamma
    4
    >>> type(make_policy("online")).__name__, type(make_policy("online", bare=True)).__name__
    ('SafetyGuard', 'Online')

    Parameters
    ----------
    spec : str
        See the module's docstring.
    bare : bool
        Leave the safety guard out, whatever the spec says.
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
    options |= parse_options(name, text, hints, getattr(cls, "positional", ""))
    safety = {key: options.pop(key, default) for key, (_, default) in SAFETY.items()}
    try:
        policy = cls(**options)
        if bare or not (getattr(cls, "guarded", False) and safety["safety"]):
            return policy
        return SafetyGuard(policy, safety["safety_gamma"], safety["safety_epsilon"], sleeps=safety["sleeps"])
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None
    except Exception as error:  # anybody's constructor
        raise PolicyError(f"{name}: cannot be built from {options}: {type(error).__name__}: {reason(error)}") from error


def available() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every registered policy, sorted by name; of one that will not load, why."""
    rows = [(name, _load(target).summary) for name, target in BUILTIN.items()]
    for name, point in plugins(GROUP).items():
        if name not in BUILTIN:
            try:
                rows.append((name, _load(point.value).summary))
            except PolicyError as error:
                package = f" (of the package {point.dist.name})" if point.dist is not None else ""
                rows.append((name, f"does not load{package}: {error}"))
    return sorted(rows)


def policy_class(spec: str) -> type[Policy]:
    """Return the class that a spec string names; raises :class:`PolicyError` as :func:`make_policy` does.

    >>> policy_class("fixed:4").__name__
    'Fixed'
    """
    return _resolve(spec)[1]


def canonical(spec: str) -> str:
    """Return a spec under the policy's own name, with its options in order; seeds are left out.

    >>> canonical("fixed:gamma=4,seed=3"), canonical("online:refresh=64,lookups=no")
    ('fixed:gamma=4', 'online:lookups=False,refresh=64')
    """
    name, cls, text = _resolve(spec)
    hints = {key: hint for key, (hint, _) in _options(cls).items()}
    found = parse_options(name, text, hints, getattr(cls, "positional", ""))
    return f"{name}:{','.join(f'{k}={found[k]}' for k in sorted(found) if k not in ('seed', 'worker'))}".rstrip(":")


def options(name: str) -> dict[str, tuple[str, Any]]:
    """Return option -> (type, default) of a registered policy, for help texts.

    >>> options("fixed")["gamma"]
    ('a whole number', 4)
    """
    _, cls, _ = _resolve(name)
    return {key: (spell(hint), default) for key, (hint, default) in _options(cls).items()}


def _resolve(spec: str) -> tuple[str, type[Policy], str]:
    """Split a spec into (name, class, options text)."""
    name, _, rest = _renamed(spec.strip()).partition(":")
    found = plugins(GROUP)
    if name in BUILTIN:
        return name, _load(BUILTIN[name]), rest
    if name in found:
        return name, _load(found[name].value), rest
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
    known = sorted({*BUILTIN, *found})
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}, or give MODULE:CLASS"
    raise PolicyError(f"unknown policy '{name}': {hint}")


def _renamed(spec: str) -> str:
    """Return a spec under the policy's own name, see :data:`RENAMED`."""
    name, _, rest = spec.partition(":")
    given = rest.split(",") if rest else []
    for old, new in RENAMED.items():
        former, _, option = old.partition(":")
        if name != former or (option and option not in given):
            continue
        if old not in _told:
            _told.add(old)
            log.warning("policy '%s' is called '%s' now", old, new)
        own, _, options = new.partition(":")
        if option:
            given.remove(option)
        kept = ",".join([options, *given] if options else given)
        return f"{own}:{kept}" if kept else own
    return spec


def _load(target: str) -> type[Policy]:
    """Import ``module:Class``."""
    found = load_object(target, "policy")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{target} is not a subclass of policies.base.Policy")
    return found


def _options(cls: type[Policy]) -> dict[str, tuple[Any, Any]]:
    """Return option -> (type, default)."""
    found = constructor_options(cls)
    return found | SAFETY if getattr(cls, "guarded", False) else found
