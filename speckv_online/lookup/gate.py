"""The hybrid drafter's gate: whether the draft model or the n-gram lookup is right where they disagree.

One logistic model over both proposals' signals, and a second over the lookup's alone that says how likely that is to be
right, before the model was asked. Plain floats: a decision takes about two microseconds.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import as_file, files
from math import exp, log, log2
from pathlib import Path
from typing import Any

import numpy as np

from policies.base import CONFIDENCE, ENTROPY, MARGIN, reason
from speckv_online.errors import UserError
from speckv_online.io.files import UNREADABLE, write_atomically
from speckv_online.lookup.ngram_index import Proposal

FORMAT, VERSION = "speckv-gate", 1
SHIPPED = "gate-smollm2.npz"

#: Inputs of the two models, in the order of their weights.
LOOKUP_FEATURES = ("one", "lookup log-odds", "lookup entropy", "match length", "log2 hits")
FEATURES = (*LOOKUP_FEATURES, "model log-odds", "model entropy", "model margin")


class Gate:
    """Chooses between the model's and the lookup's proposals.

    Parameters
    ----------
    weights : array_like, shape (8,)
        Of :data:`FEATURES`; above zero the lookup is right rather than the model, given that one of them is.
    sure : array_like, shape (5,)
        Of :data:`LOOKUP_FEATURES`: log-odds that the lookup is right.
    skip : float
        How sure the lookup has to be for the model not to be asked at all; 1 asks it always.
    card : dict, optional
        What it was fitted to.
    """

    def __init__(self, weights: Any, sure: Any, skip: float = 1.0, card: dict[str, Any] | None = None) -> None:
        arrays = {"weights": np.array(weights, float), "sure": np.array(sure, float)}
        for (name, array), inputs in zip(arrays.items(), (FEATURES, LOOKUP_FEATURES), strict=True):
            if array.shape != (len(inputs),) or not np.isfinite(array).all():
                raise ValueError(f"{name} has shape {array.shape} or is not finite, expected ({len(inputs)},)")
        self.weights: list[float] = arrays["weights"].tolist()
        self.sure_weights: list[float] = arrays["sure"].tolist()
        if not 0.0 <= skip <= 1.0:
            raise ValueError(f"skip must be a probability, got {skip}")
        self.skip, self.card = float(skip), dict(card or {})

    def lookup_confidence(self, found: Proposal) -> float:
        """Return the probability that the lookup's proposal is right, whatever the model says."""
        return chance_of(found, self.sure_weights)

    def prefers_lookup(self, features: list[float]) -> bool:
        """Return whether to take the lookup's proposal; ``features`` as :func:`gate_features` gives them."""
        return _dot(self.weights, features) > 0.0

    @property
    def digest(self) -> str:
        """Short hash of the weights, for reports and traces."""
        return hashlib.sha256(np.array([*self.weights, *self.sure_weights]).astype("<f8").tobytes()).hexdigest()[:16]

    def save(self, path: str | Path) -> Path:
        """Write an ``.npz`` file, and its card as JSON beside it."""
        path = Path(path)
        facts = {"features": FEATURES, "skip": self.skip, "card": self.card}
        head = json.dumps({"format": FORMAT, "version": VERSION} | facts)
        arrays: dict[str, Any] = {"weights": np.array(self.weights), "sure": np.array(self.sure_weights)}
        arrays["head"] = np.array(head)
        write_atomically(path, lambda f: np.savez(f, **arrays), binary=True)
        card = {"format": FORMAT, "version": VERSION, "digest": self.digest, "skip": self.skip} | self.card
        write_atomically(path.with_suffix(".json"), lambda f: f.write(json.dumps(card, indent=1) + "\n"))
        return path

    @classmethod
    def load(cls, path: str | Path | None = None) -> Gate:
        """Read a gate, by default the one that ships; raises :class:`UserError` for a file that is none."""
        if path is None:
            with as_file(files("speckv_online") / "data" / SHIPPED) as shipped:
                return cls.load(shipped)
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head.get("format") != FORMAT or head.get("version") != VERSION:
                    raise ValueError(f"expected {FORMAT} version {VERSION}")
                if tuple(head["features"]) != FEATURES:
                    raise ValueError("it was fitted to other features")
                return cls(file["weights"], file["sure"], head["skip"], head["card"])
        except FileNotFoundError:
            raise UserError(f"no gate {path}: fit one with python -m experiments.gate") from None
        except UNREADABLE as error:
            raise UserError(
                f"{path} is no usable gate: {reason(error)}; fit one with python -m experiments.gate"
            ) from error


def lookup_features(found: Proposal) -> list[float]:
    """Return the lookup's features, see :data:`LOOKUP_FEATURES`."""
    return [1.0, _log_odds(found.confidence), found.entropy, float(found.length), log2(found.hits)]


def chance_of(found: Proposal, weights: list[float]) -> float:
    """Return the probability that a lookup is right; ``weights`` as a gate has for :data:`LOOKUP_FEATURES`."""
    return _sigmoid(_dot(weights, lookup_features(found)))


@cache
def shipped_chances() -> list[float]:
    """Return the weights of :func:`chance_of` that ship."""
    return Gate.load().sure_weights


def gate_features(found: Proposal, signals: np.ndarray) -> list[float]:
    """Return the gate's features from a lookup and the model's (N_SIGNALS,) signals, see :data:`FEATURES`."""
    s = signals.tolist()
    return [*lookup_features(found), _log_odds(s[CONFIDENCE]), s[ENTROPY], min(s[MARGIN], 20.0)]


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-3), 1.0 - 1e-3)
    return log(p / (1.0 - p))


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + exp(-min(max(z, -30.0), 30.0)))


def _dot(weights: list[float], x: list[float]) -> float:
    return sum([w * v for w, v in zip(weights, x, strict=True)])
