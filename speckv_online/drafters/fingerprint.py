"""What tells one drafter from another, so that traces of different ones never mix."""

from __future__ import annotations

from speckv_online.drafters.base import Drafter
from speckv_online.drafters.hybrid import HybridDrafter
from speckv_online.drafters.model import ModelDrafter
from speckv_online.lookup.ngram_index import MAX_N, SMOOTHING
from speckv_online.modeling.fingerprint import fingerprint


def drafter_fingerprint(drafter: Drafter) -> str:
    """Return a short hash of everything that a drafter's proposals depend on."""
    if isinstance(drafter, ModelDrafter):
        model = fingerprint(drafter.model) + ("" if drafter.quick is None else "-w8a8")
        if isinstance(drafter, HybridDrafter):
            return f"{model}-gate-{drafter.gate.digest}-skip-{drafter.skip:g}"
        return model
    return f"{drafter.names[0]}-{MAX_N}-{SMOOTHING:g}"
