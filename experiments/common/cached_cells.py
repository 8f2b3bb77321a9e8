"""Cells of an experiment on traces: independent pieces of work, played side by side, each of them once.

Each cell goes into an append-only log when it is done, with a digest of the settings and of the code and data that
played it. A run that is started again plays what the log lacks, and what was played under other settings or code.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.code_digest import digest
from speckv_online.io.files import UNREADABLE

#: What to play, as text, so that it is the same in JSON.
Cell = tuple[str, ...]


def run(
    todo: Sequence[Cell],
    play: Callable[[Cell], Any],
    log: Path,
    *,
    code: Sequence[str],
    policies: Sequence[str] = (),
    settings: str = "",
    weight: Callable[[Cell], float] = lambda cell: 0.0,
    processes: int = 1,
    elsewhere: Callable[[Sequence[Cell], Callable[[Cell], Any]], Iterator[tuple[Cell, Any]]] | None = None,
) -> dict[Cell, Any]:
    """Play the cells that the log lacks, and return the results of all.

    Parameters
    ----------
    todo : sequence of tuple of str
    play : callable
        Returns a cell's result, ready for JSON; with several processes it has to be picklable.
    log : Path
        JSON lines; made where it is missing.
    code : sequence of str
        Modules that play the cells; what they import counts as well, and so does every policy.
    policies : sequence of str
        Spec strings of the policies that are played.
    settings : str
        What results depend on besides the cell and the code.
    weight : callable
        How long a cell takes, roughly: the longest are played first, so that no process is left with one at the end.
    processes : int
        How many cells to play at a time.
    elsewhere : callable, optional
        Plays cells in place of processes here, and yields each with its result.
    """
    from tqdm import tqdm

    version = digest(code, settings, policies)
    done = {cell: found for cell, found in _read(log, version) if cell in set(todo)}
    left = sorted((cell for cell in todo if cell not in done), key=weight, reverse=True)
    bar = tqdm(total=len(todo), initial=len(done), unit="cell", disable=not sys.stderr.isatty(), file=sys.stderr)
    with log.open("a", encoding="utf-8") as file:
        if log.stat().st_size and not log.read_bytes().endswith(b"\n"):
            file.write("\n")  # a kill cut the last line short
        for cell, found in elsewhere(left, play) if elsewhere else _play_all(left, play, processes):
            done[cell] = found
            file.write(json.dumps({"cell": cell, "code": version, "found": found}) + "\n")
            file.flush()
            bar.update()
            if bar.disable:
                print(f"{len(done)}/{len(todo)} {', '.join(cell)}", file=sys.stderr, flush=True)
    return done


def contents(sources: Iterable[str]) -> str:
    """Return a short hash of what is in the traces of directories, and in files: the same names may hold something else
    by the time that a run is started again. Names of no file count themselves."""
    made = hashlib.sha256()
    for source in sources:
        path = Path(source).expanduser()
        files = sorted(path.rglob("*.npz")) if path.is_dir() else []
        for file in files:
            try:
                with np.load(file, allow_pickle=False) as arrays:  # the file itself tells when it was written, too
                    for name in arrays.files:
                        made.update(name.encode() + arrays[name].tobytes())
            except UNREADABLE:  # for whoever needs the trace to complain of
                made.update(file.read_bytes())
        if not files:
            made.update(path.read_bytes() if path.is_file() else source.encode())
    return made.hexdigest()[:16]


def _play_all(todo: Sequence[Cell], play: Callable[[Cell], Any], processes: int) -> Iterator[tuple[Cell, Any]]:
    if processes == 1:
        for cell in todo:
            yield cell, play(cell)
        return
    # Fresh processes: a fork would take over the state of whatever threads the libraries have started.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_leave_interrupts) as pool:
        waiting = {pool.submit(play, cell): cell for cell in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            # A cell may take minutes, and what is under way is lost anyhow.
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _leave_interrupts() -> None:
    """Let Ctrl-C be the main process's affair: a terminal sends it to all, and each would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(log: Path, version: str) -> Iterator[tuple[Cell, Any]]:
    """Yield what the log holds of this version; a line that a kill cut short is skipped."""
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["code"] == version:
            yield tuple(row["cell"]), row["found"]
