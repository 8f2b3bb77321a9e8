"""What tells one drafter from another, so that traces of different ones never mix."""

from __future__ import annotations

from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.drafters.ngram import NgramDrafter
from speckv_online.lookup.ngram_index import MAX_N, SMOOTHING
from speckv_online.modeling.fingerprint import fingerprint

#: Drafters whose proposals are known; a class of its own, a subclass too, may propose anything.
_OURS = (ModelDrafter, HybridDrafter, NgramDrafter)


def drafter_fingerprint(drafter: Drafter) -> str:
    """Return a short hash of everything that a drafter's proposals depend on.

    A plug-in's drafter says it in its attribute ``fingerprint``, a text. One without it is told by its class.
    """
    own = getattr(drafter, "fingerprint", None)
    if own is not None:
        return str(own)
    kind = type(drafter)
    found = [] if kind in _OURS else [f"{kind.__module__}.{kind.__qualname__}"]
    if isinstance(drafter, ModelDrafter):
        found.append(fingerprint(drafter.model) + ("" if drafter.compiled is None else "-w8a8"))
        if isinstance(drafter, HybridDrafter):
            found.append(f"gate-{drafter.gate.digest}-skip-{drafter.skip:g}")
    elif isinstance(drafter, NgramDrafter):
        found.append(f"{drafter.names[0]}-{MAX_N}-{SMOOTHING:g}")
    return "-".join(found)
