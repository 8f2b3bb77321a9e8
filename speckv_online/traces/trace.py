"""Exact traces: for one prompt and level, what every policy would meet at every position of the output.

Under greedy decoding the target's output y does not depend on the policy, and a draft depends only on the prefix it
starts from. So one table per (prompt, level) replays any policy exactly: for each position t of y, the tokens that the
drafter proposes from there, how many of them the target accepts, and their signals. This file has the table and its
file format; :mod:`speckv_online.profiling.trace_collection` fills it, :mod:`speckv_online.simulate` replays it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from policies.base import LOOKUP, N_SIGNALS, reason
from speckv_online.errors import UserError
from speckv_online.io.files import UNREADABLE, write_atomically
from speckv_online.lookup.gate import LOOKUP_FEATURES
from speckv_online.traces.rows import Rows
from speckv_online.traces.switch_to_lookup import SwitchToLookup

FORMAT, VERSION = "speckv-trace", 1
#: Entry of a drafts table where the drafter has nothing to propose.
NOTHING = -1


def until_end(drafts: Sequence[int], ends: Collection[int]) -> int:
    """Return how many drafts there are up to the first that ends a sequence, it included."""
    return next((i + 1 for i, token in enumerate(drafts) if token in ends), len(drafts))


@dataclass(frozen=True)
class Trace:
    """One exact trace of L output tokens, with drafts of up to G tokens from each of its positions.

    Attributes
    ----------
    level, task, prompt_id, split : str
        Compression level of the target, and what the prompts file says of the prompt.
    prompt : ndarray of int32, shape (P,)
        Prompt tokens.
    tokens : ndarray of int32, shape (L,)
        The target's greedy output, an end-of-sequence token included.
    drafts : ndarray of int32, shape (L, G)
        Tokens that the drafter proposes after ``prompt + tokens[:t]``; -1 from where it has nothing to propose.
    accepted : ndarray of int16, shape (L,)
        Leading tokens of ``drafts[t]`` that agree with ``tokens[t:]``.
    signals : ndarray of float32, shape (L, G, N_SIGNALS)
        Entropy (bits), confidence, margin (logits) and n-gram signal of each drafted token.
    budget : int
        Most tokens that the generation was allowed.
    finish : str
        ``"eos"`` or ``"length"``.
    meta : dict
        Fingerprints of the models, versions and whatever else the collector wrote down. Of a drafter with a
        model its ``lookup_weights``, without which a replay offers no lookups in place of forwards. ``eos`` lists the
        tokens that end a sequence: nothing is drafted after one. Older traces lack it.
    lookups : ndarray of float32, shape (L, G), optional
        How sure the drafter is of each token beforehand where that takes no forward of a model, 0 where it does; left
        out where all take one.
    """

    level: str
    task: str
    prompt_id: str
    prompt: np.ndarray
    tokens: np.ndarray
    drafts: np.ndarray
    accepted: np.ndarray
    signals: np.ndarray
    budget: int
    finish: str
    split: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    lookups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def gamma(self) -> int:
        """Longest draft of the trace (G)."""
        return int(self.drafts.shape[1])

    @cached_property
    def available(self) -> np.ndarray:
        """How many tokens the drafter proposes at each position before it has nothing more, shape (L,)."""
        return np.logical_and.accumulate(self.drafts != NOTHING, axis=1).sum(axis=1)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return frozenset(self.meta.get("eos", ()))

    @cached_property
    def ended(self) -> np.ndarray:
        """How many tokens a step drafts at each position at most: an end of sequence is the last, shape (L,)."""
        if not self.ends:
            return self.available
        counts = zip(self.rows.drafts, self.rows.available, strict=True)
        return np.array([until_end(drafts[:n], self.ends) for drafts, n in counts])

    @property
    def reads(self) -> bool:
        """Whether the drafter has a cache that may lag behind the context; a mere lookup has none."""
        return bool(self.meta.get("drafter", "model") != LOOKUP)

    @cached_property
    def forwards(self) -> np.ndarray:
        """How many forwards of the draft model the first j tokens of each position take, shape (L, G + 1)."""
        asked = np.ones(self.drafts.shape, int) if self.lookups is None else (self.lookups == 0.0).astype(int)
        return np.pad(asked.cumsum(axis=1), ((0, 0), (1, 0)))

    @cached_property
    def read(self) -> np.ndarray:
        """How many of the first j tokens of each position the draft model has read by then, shape (L, G + 1).

        A forward reads all before the token that it proposes, so these are the tokens before the latest forward.
        """
        forwards = self.forwards
        before = np.where(np.diff(forwards, axis=1) > 0, np.arange(self.gamma), 0)
        return np.pad(np.maximum.accumulate(before, axis=1), ((0, 0), (1, 0)))

    @cached_property
    def switch(self) -> SwitchToLookup | None:
        """What the drafter would go on with if a policy left its model within a step; None where it has no choice."""
        weights = self.meta.get("lookup_weights")
        if weights is None:
            return None
        return SwitchToLookup(self.prompt.tolist(), self.rows, weights, self.meta.get("drafter") == "hybrid")

    @cached_property
    def rows(self) -> Rows:
        """The trace as a replay reads it; made once, since a trace is replayed many times."""
        return Rows(
            self.tokens.tolist(),
            self.drafts.tolist(),
            self.accepted.tolist(),
            self.available.tolist(),
            self.signals.astype(float),
            [] if self.lookups is None else self.lookups.astype(float).tolist(),
            self.forwards.tolist(),
            self.read.tolist(),
        )

    def check(self) -> None:
        """Raise ValueError where shapes or values contradict each other."""
        kinds = dict.fromkeys(("level", "task", "prompt_id", "split"), str) | {"budget": int, "meta": dict}
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which is no {kind.__name__}")
        length, gamma = self.drafts.shape if self.drafts.ndim == 2 else (-1, -1)
        shapes = {"prompt": (len(self.prompt),), "tokens": (length,), "drafts": (length, gamma)}
        shapes |= {"accepted": (length,), "signals": (length, gamma, N_SIGNALS)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.finish not in ("eos", "length") or not 0 < length <= self.budget or not len(self.prompt):
            raise ValueError(f"{length} tokens of a budget of {self.budget} cannot have ended by {self.finish!r}")
        if not np.array_equal(self.accepted, agreement(self.drafts, self.tokens)):
            raise ValueError("the accepted lengths are not those of its drafts and tokens")
        if not np.isfinite(self.signals).all():
            raise ValueError("signals are not finite")
        eos = self.meta.get("eos", [])
        if not isinstance(eos, list) or not all(type(token) is int for token in eos):
            raise ValueError(f"eos is {eos!r}, which are no tokens")
        weights = self.meta.get("lookup_weights", [0.0] * len(LOOKUP_FEATURES))
        if not isinstance(weights, list) or np.shape(weights) != (len(LOOKUP_FEATURES),) or not _finite(weights):
            raise ValueError(f"lookup_weights is {weights!r}, which are no weights of a gate")
        if self.lookups is not None:
            if self.lookups.shape != (length, gamma):
                raise ValueError(f"lookups has shape {self.lookups.shape}, expected {(length, gamma)}")
            if not ((self.lookups >= 0.0) & (self.lookups <= 1.0)).all():
                raise ValueError("lookups are not probabilities")

    def save(self, path: str | Path) -> Path:
        """Write the trace to an ``.npz`` file, whole or not at all."""
        text = ("level", "task", "prompt_id", "split", "budget", "finish", "meta")
        head = {"format": FORMAT, "version": VERSION} | {name: getattr(self, name) for name in text}
        arrays = {n: getattr(self, n) for n in ("prompt", "tokens", "drafts", "accepted", "signals")}
        if self.lookups is not None:
            arrays["lookups"] = self.lookups
        arrays["head"] = np.array(json.dumps(head))
        return write_atomically(path, lambda f: np.savez_compressed(f, **arrays), binary=True)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read and check a trace; raises :class:`UserError` naming the file and what is wrong with it."""
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"])) if "head" in file else {}
                if head.pop("format", None) != FORMAT:
                    raise ValueError(f"not a {FORMAT} file")
                if (version := head.pop("version", None)) != VERSION:
                    raise ValueError(f"trace version {version}, this program reads version {VERSION}")
                arrays = {n: file[n] for n in ("prompt", "tokens", "drafts", "accepted", "signals")}
                if "lookups" in file:
                    arrays["lookups"] = file["lookups"]
            trace = cls(**head, **arrays)
            trace.check()
        except FileNotFoundError:
            raise UserError(f"no trace file {path}: collect one with python -m experiments.profile") from None
        except UNREADABLE as error:
            raise UserError(
                f"{path} is not a usable trace: {reason(error)}; delete it, and collect it again with "
                "python -m experiments.profile and the settings of the others"
            ) from error
        return trace


def load_traces(source: str | Path, *, levels: Collection[str] = (), splits: Collection[str] = ()) -> list[Trace]:
    """Load a trace file, or all traces below a directory in the order of their paths, optionally of some levels or
    splits.

    Raises
    ------
    UserError
        If nothing is left to load, or a file is damaged.
    """
    source = Path(source).expanduser()
    paths = sorted(source.rglob("*.npz")) if source.is_dir() else [source]
    traces = [Trace.load(path) for path in paths]
    kept = [t for t in traces if (not levels or t.level in levels) and (not splits or t.split in splits)]
    if not kept:
        wanted = " ".join([*levels, *splits]) or "any kind"
        there = sorted({f"{t.level} of the split {t.split or 'none'}" for t in traces})
        found = f"it has {', '.join(there)}" if there else "collect some with python -m experiments.profile"
        raise UserError(f"no traces of {wanted} in {source}: {found}")
    return kept


def agreement(drafts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return, per position t, how many leading tokens of ``drafts[t]`` equal ``tokens[t:]``, shape (L,) int16."""
    length, gamma = drafts.shape
    index = np.arange(length)[:, None] + np.arange(gamma)
    follow = np.append(tokens, np.full(gamma, np.iinfo(np.int32).min, dtype=tokens.dtype))[index]
    return np.logical_and.accumulate(drafts == follow, axis=1).sum(axis=1).astype(np.int16)


def _finite(values: list[Any]) -> bool:
    return all(type(value) is float and math.isfinite(value) for value in values)


def prompt_hash(prompt: Sequence[int]) -> str:
    """Return a short hash of the prompt's token ids."""
    return hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).hexdigest()[:16]
