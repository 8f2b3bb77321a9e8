"""The directory that a run writes: manifest, resolved config, step records and policy checkpoints.

``run.json`` (manifest), ``config.yaml`` (resolved), ``steps-*.jsonl`` (append-only, one file per level) and
``policy-*.npz``. A *unit* is one prompt decoded under one policy at one level in one seeded order. Its steps count only
once a line says that the unit is done, and only once, so that a run which was killed can go on where it stopped.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speckv_online.errors import UserError
from speckv_online.io.files import read_settings, write_atomically
from speckv_online.io.step_records import SCHEMA_VERSION, StepRecord

KIND = "speckv-steps"
FREE_BYTES = 50_000_000
_STEP_FIELDS = tuple(f.name for f in fields(StepRecord))


@dataclass(frozen=True, slots=True)
class Unit:
    """What was decoded, and how: one prompt, one policy, one level, one seeded order of the prompts."""

    level: str
    policy: str
    prompt: str
    task: str
    seed: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes the unit unique within a run."""
        return self.level, self.policy, self.prompt, self.seed


@dataclass(slots=True)
class UnitResult:
    """A finished unit, with its steps and what its last line says besides, such as its ``output`` token ids."""

    unit: Unit
    steps: list[StepRecord]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens produced."""
        return sum(s.produced for s in self.steps)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, prefill left out."""
        return sum(s.seconds for s in self.steps)


class RunDir:
    """A run directory that is open for writing.

    Use :meth:`open`, which refuses a place that cannot be written before any model is loaded.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path, self.resumed = path, resumed

    @classmethod
    def open(cls, path: str | Path, config: Mapping[str, Any], *, volatile: Sequence[str] = ()) -> RunDir:
        """Make a run directory, or reopen one that was written with the same config.

        Parameters
        ----------
        path : str or Path
            Directory; it and its parents are made.
        config : mapping
            Resolved configuration, written as ``config.yaml``.
        volatile : sequence of str
            Keys that may differ when a run is taken up again.

        Raises
        ------
        UserError
            If the directory cannot be written, is nearly out of disk space, or holds something else.
        """
        path = Path(path)
        config = json.loads(json.dumps(config))  # what YAML gives back: lists for tuples
        check_writable(path)
        resumed = (path / "config.yaml").exists()
        if resumed:
            earlier = read_settings(path / "config.yaml")
            for key, value in (("engine", "auto"), ("remember", False)):  # runs from before there was a choice
                if key in config:
                    earlier.setdefault(key, value)
            changed = sorted(
                key for key in config.keys() | earlier.keys()
                if key not in volatile and config.get(key) != earlier.get(key)
            )  # fmt: skip
            if changed:
                raise UserError(
                    f"{path} holds a run with other settings ({', '.join(changed)}): "
                    "give the same ones to continue it, or another --out"
                )
        elif any(not file.name.startswith(".") for file in path.iterdir()):  # a killed run may have left those
            raise UserError(f"{path} is neither empty nor a run directory: give another --out")
        write_atomically(path / "config.yaml", lambda f: yaml.safe_dump(config, f, sort_keys=False))
        return cls(path, resumed)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        write_atomically(self.path / "run.json", lambda f: f.write(json.dumps(manifest, indent=2) + "\n"))


class StepWriter:
    """Appends finished units to one ``steps-*.jsonl``.

    The steps of a unit and the line that closes it are written together; if that fails, the file is cut back to what it
    was. Whatever a killed process left behind its last complete unit is cut off when the file is opened again.

    Parameters
    ----------
    path : str or Path
        File; its name ends in ``.jsonl``.

    Attributes
    ----------
    done : set of tuple
        Keys of the units that the file holds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.done: set[tuple[str, str, str, int]] = set()
        keep = 0
        if self.path.exists():
            for result, keep in read_from(self.path):  # noqa: B007  keep is the end of the last complete unit
                self.done |= {result.unit.key} if result is not None else set()
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  lives as long as the writer
            if os.path.getsize(self.path) > keep:
                self._file.truncate(keep)
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror or e}; choose another --out") from e
        if keep == 0:
            self._append([{"kind": KIND, "schema": SCHEMA_VERSION}])

    def write(self, unit: Unit, steps: Sequence[StepRecord], facts: Mapping[str, Any] | None = None) -> None:
        """Append a finished unit; a unit that the file already holds is left alone."""
        if unit.key in self.done:
            return
        name = asdict(unit)
        lines: list[dict[str, Any]] = [name | step.as_dict() for step in steps]
        self._append([*lines, {"done": name, "steps": len(steps)} | dict(facts or {})])
        self.done.add(unit.key)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = memoryview("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as e:
            self._file.truncate(size)
            raise UserError(f"cannot write {self.path}: {e.strerror or e}; free some disk and run again") from e


def check_writable(path: Path) -> None:
    """Make the directory and try a file in it; raises :class:`UserError` if that fails or the disk is nearly full."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"probe")
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as e:
        raise UserError(f"cannot write to {path}: {e.strerror or e}; choose another --out") from e
    if free < FREE_BYTES:
        raise UserError(f"only {free // 1_000_000} MB are free at {path}: free some disk or choose another --out")


def read_units(path: str | Path) -> list[UnitResult]:
    """Return all finished units of a run directory, each once, in the order in which they were written.

    Raises
    ------
    UserError
        If there is no such run, a line is broken, or the records are of a newer schema.
    """
    files = sorted(Path(path).glob("steps-*.jsonl"))
    if not files:
        raise UserError(f"{path} holds no step records (steps-*.jsonl): give the directory of a run")
    units: dict[tuple[str, str, str, int], UnitResult] = {}
    for file in files:
        for result, _ in read_from(file):
            if result is not None:
                units.setdefault(result.unit.key, result)
    return list(units.values())


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return ``run.json`` of a run directory; raises :class:`UserError` if it is missing or broken."""
    file = Path(path) / "run.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}; give the directory of a run") from e
    except ValueError as e:
        raise UserError(f"{file} is broken ({e})") from e
    if not isinstance(manifest, dict):
        raise UserError(f"{file} is not a manifest")
    return manifest


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays as ``.npz`` atomically; arrays of objects are refused, since reading them would need pickle."""
    values = {key: np.asarray(value) for key, value in arrays.items()}
    for key, value in values.items():
        if value.dtype.hasobject:
            raise ValueError(f"array {key!r} holds Python objects and cannot be saved")
    packed = io.BytesIO()  # savez seeks and writes some hundred times
    np.savez(packed, **values)  # type: ignore[arg-type]
    return write_atomically(path, lambda f: f.write(packed.getbuffer()), binary=True)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read an ``.npz`` file without unpickling anything; raises :class:`UserError` for every other kind of file."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            if not zipfile.is_zipfile(f):
                raise UserError(f"{path} is not an .npz file (pickles are refused: reading one runs its code)")
            f.seek(0)
            with np.load(f, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is not a readable .npz file: {(str(e) or type(e).__name__).splitlines()[0]}") from e


def read_from(path: str | Path, start: int = 0) -> Iterator[tuple[UnitResult | None, int]]:
    """Yield (unit, offset behind it) for every complete unit of a file, and (None, offset) behind the header.

    Steps without the line that closes their unit, and a last line without its end, are left out: they may be being
    written right now. ``start`` is an offset that was yielded before, to go on from there.
    """
    try:
        with open(path, "rb") as f:
            f.seek(start)
            data = f.read()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    pending: dict[tuple[Any, ...], list[StepRecord]] = {}
    offset = start
    for number, raw in enumerate(data.split(b"\n")[:-1], start=1):
        offset += len(raw) + 1
        try:
            row = json.loads(raw)
            if number == 1 and not start:
                _check_header(row, Path(path))
                yield None, offset
            elif "done" in row:
                unit = Unit(**row.pop("done"))
                steps = pending.pop(unit.key, [])
                count = row.pop("steps")
                if len(steps) < count:
                    raise ValueError(f"{count - len(steps)} of {count} steps are missing")
                yield UnitResult(unit, steps[len(steps) - count :], row), offset
            else:
                key = (row["level"], row["policy"], row["prompt"], row["seed"])
                row.setdefault("forwards", -1)  # schema 1 lacks it
                row.setdefault("learn_seconds", 0.0)  # up to schema 2 in decide_seconds
                row["labelled"] = row.pop("tested", row.get("labelled"))  # its name up to schema 2
                pending.setdefault(key, []).append(StepRecord(**{name: row[name] for name in _STEP_FIELDS}))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            where = f"{path}, {number} lines behind byte {start}" if start else f"{path}:{number}"
            raise UserError(f"{where}: broken step record ({type(e).__name__}: {e})") from e


def _check_header(row: Any, path: Path) -> None:
    if not isinstance(row, dict) or row.get("kind") != KIND:
        raise UserError(f"{path} does not start like a file of step records")
    if row["schema"] > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {row['schema']}, newer than this version reads: update speckv_online")
