"""What a server is told: which policy, and where its state is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from policies.base import Policy, PolicyError
from policies.registry import make_policy
from speckv_online.errors import UserError

#: Policies that have another form inside an engine, which shows no signals of its drafts.
INSIDE = {"online": "policies.learned.online_engine:OnlineEngine"}
#: The safety guard's options there, where a spec does not set them.
GUARD = {"sleeps": "off", "safety_epsilon": "0.02"}


@dataclass(frozen=True)
class Settings:
    """Settings of the plug-in.

    Attributes
    ----------
    policy : str
        A spec string.
    state : str
        File of what the policy learnt; empty for none.
    metrics : str
        File that the counts are written to as JSON; empty for none.
    steps : str
        File that each step's sizes and seconds are appended to, for a calibration; empty for none.
    """

    policy: str = "online"
    state: str = ""
    metrics: str = ""
    steps: str = ""

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ) -> Settings:
        """Return the settings: those given, else ``SPECKV_POLICY`` and so on.

        Raises
        ------
        UserError
            For an unknown setting, or one that is no text.
        """
        given = {} if given is None else given
        names = [f.name for f in fields(cls)]
        if not isinstance(given, Mapping) or any(key not in names for key in given):
            raise UserError(f"speckv's settings are {', '.join(names)}, not {given!r}")
        found = {name: given.get(name, environment.get(f"SPECKV_{name.upper()}", getattr(cls, name))) for name in names}
        if bad := [name for name, value in found.items() if not isinstance(value, str)]:
            raise UserError(f"speckv's setting {bad[0]} must be text, not {found[bad[0]]!r}")
        return cls(**found)


def engine_policy(spec: str, **defaults: Any) -> Policy:
    """Build the policy of a spec string as it is inside an engine.

    >>> type(engine_policy("fixed:2")).__name__
    'Fixed'

    Raises
    ------
    UserError
        For a spec that describes none.
    """
    name, _, options = spec.strip().partition(":")
    try:
        if name in INSIDE:
            set_already = {option.partition("=")[0] for option in options.split(",")}
            more = [f"{key}={value}" for key, value in GUARD.items() if key not in set_already]
            spec = f"{INSIDE[name]}:{','.join([*([options] if options else []), *more])}"
        return make_policy(spec, **defaults)
    except PolicyError as error:
        raise UserError(f"policy '{spec}': {error}") from None
