"""Stored states: a second run starts where the first ended, processes add up, nothing half-written is left."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.base import Policy, State
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.learned import store as stores
from speckv_online.learned.key import Key
from speckv_online.learned.record import Record
from speckv_online.learned.store import DAMAGED, Damaged, Entry, Store
from speckv_online.learned.sums import sums_of
from tests.support import tally
from tests.support.runs import COUNTER, HERMIT, ROOT, environment
from tests.support.tapes import make_tapes, play

KEY = Key("online", "a" * 16, "b" * 16, "nf4", 1, "a processor, 2 threads", "plain modules")
SPEC = "online:safety=off"


def record(folder: Path, spec: str = SPEC, key: Key = KEY) -> Record:
    return Record(Store(folder), key, make_policy(spec), {})


def save(into: Record, policy: Policy, steps: int = 1, *, exact: bool = True) -> State:
    with into.store.locked():
        return into.add([policy.take_delta()], policy.state_dict(), steps, 2 * steps, exact=exact)


def stored(folder: Path, key: Key = KEY) -> Entry:
    found = Store(folder).read(key)
    assert found is not None
    return found


def begun(folder: Path, spec: str = SPEC) -> tuple[Record, Policy]:
    """A process's record, and its policy started from what is stored."""
    mine, policy = record(folder, spec), make_policy(spec)
    if state := mine.read():
        policy.load_state_dict(state)
    return mine, policy


@pytest.mark.parametrize("spec", [SPEC, "online", "linucb", "mlp16", "leviathan", "hf-heuristic"])
def test_a_second_run_starts_where_the_first_ended(tmp_path: Path, spec: str) -> None:
    first, long = begun(tmp_path, spec)
    play(long, make_tapes(1, 6), noise=0.0)
    save(first, long)
    _, second = begun(tmp_path, spec)
    long.load_state_dict(long.state_dict())  # so that both refresh at the same steps
    later = make_tapes(2, 3)
    assert play(second, later, noise=0.0).gammas == play(long, later, noise=0.0).gammas


def test_what_was_learnt_makes_a_difference(tmp_path: Path) -> None:
    first, policy = begun(tmp_path)
    play(policy, make_tapes(1, 6, ease=3.0))
    save(first, policy)
    for seed in (2, 3):
        later = make_tapes(seed, 1, ease=3.0)
        assert play(begun(tmp_path)[1], later).goodput > 1.05 * play(make_policy(SPEC), later).goodput


def test_sums_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """One after the other in steps, side by side in processes; the merge is exact up to rounding and the pace."""
    spec = "online:safety=off,discount=1"
    (one, a), (two, b) = begun(tmp_path, spec), begun(tmp_path, spec)
    tapes = make_tapes(1, 6)
    play(a, tapes[:3], noise=0.0)
    play(b, tapes[3:], noise=0.0)
    parts = [p.state_dict() for p in (a, b)]
    assert save(one, a) == {}
    merged = save(two, b)
    found = stored(tmp_path).state
    assert set(merged) == set(found)
    for key in ("before.head.sums", "after.head.sums", "before.head.misc", "quality.nf4"):
        np.testing.assert_allclose(found[key], parts[0][key] + parts[1][key], rtol=1e-9, err_msg=key)
    a.load_state_dict(sums_of(stored(tmp_path).state))
    later = make_tapes(2, 1)
    b.load_state_dict(sums_of(merged))
    assert play(a, later, noise=0.0).gammas == play(b, later, noise=0.0).gammas


def test_a_policy_that_does_not_add_up_is_kept_whole(tmp_path: Path) -> None:
    (one, a), (two, b) = begun(tmp_path, HERMIT), begun(tmp_path, HERMIT)
    play(a, make_tapes(1, 1))
    play(b, make_tapes(1, 2))
    save(one, a)
    save(two, b)
    assert float(stored(tmp_path).state["total"]) == float(b.state_dict()["total"])


def test_a_policy_that_learns_nothing_leaves_no_file(tmp_path: Path) -> None:
    mine, policy = begun(tmp_path, "fixed:4")
    play(policy, make_tapes(1, 1))
    save(mine, policy)
    assert Store(tmp_path).entries() == {}


def test_what_was_forgotten_meanwhile_does_not_come_back(tmp_path: Path) -> None:
    mine, policy = begun(tmp_path, COUNTER)
    for length in (3, 4):
        policy.merge({"total": np.array(0.0)})
        play(policy, make_tapes(1, 1, length))
        before = float(policy.state_dict()["total"])
        Store(tmp_path).forget([KEY.name])
        save(mine, policy)
    assert 0.0 < float(stored(tmp_path).state["total"]) < before
    assert stored(tmp_path).header["steps"] == 1


def writer(folder: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.tally", str(folder), str(count)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path, 40) for _ in range(4)]
    for process in writers:
        process.communicate(timeout=120)
        assert process.returncode == 0
    found = stored(tmp_path, tally.KEY)
    assert float(found.state["total"]) == found.header["steps"] == 160
    assert found.header["tokens"] == 320


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    rng, confirmed, kills = random.Random(0), 0, 4
    for _ in range(kills):
        process = writer(tmp_path, 1_000_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        confirmed += 1 + len(process.stdout.read().splitlines())
        process.wait(60)
        found = stored(tmp_path, tally.KEY)  # whole, or this raises
        assert confirmed <= float(found.state["total"]) == found.header["steps"] <= confirmed + kills
    assert list(Store(tmp_path).damaged()) == []


@pytest.mark.parametrize("field", ["policy", "target", "draft", "level", "device", "engine", "rows"])
def test_a_state_of_something_else_is_never_used(tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture) -> None:
    mine, policy = begun(tmp_path, COUNTER)
    play(policy, make_tapes(1, 1))
    save(mine, policy)
    other = replace(KEY, **{field: 2 if field == "rows" else "another"})
    assert record(tmp_path, COUNTER, other).read() == {}
    assert caplog.messages == []
    Store(tmp_path).path(KEY.name).rename(Store(tmp_path).path(other.name))  # by hand
    assert record(tmp_path, COUNTER, other).read() == {}
    assert len(caplog.messages) == 1
    assert "something else" in caplog.messages[0]


def ruin_by_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, total=np.array([{"an": "object"}], dtype=object))


def rewrite(path: Path, **changes: np.ndarray) -> None:
    with np.load(path) as arrays:
        state = dict(arrays)
    np.savez(path, **(state | changes))


def ruin_header(path: Path) -> None:
    rewrite(path, **{"learned.header": np.frombuffer(json.dumps({"format": 99}).encode(), np.uint8)})


def ruin_huge(path: Path) -> None:
    """An array that says it has 2^60 numbers."""
    import zipfile

    with zipfile.ZipFile(path, "a") as archive:
        head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }"
        head += b" " * (118 - len(head) - 1) + b"\n"
        archive.writestr("huge.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)


RUINS = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "text": lambda path: path.write_text("not an archive"),
    "a pickle": ruin_by_pickle,
    "another format": ruin_header,
    "a huge array": ruin_huge,
    "another shape": lambda path: rewrite(path, **{"before.head.sums": np.zeros((2, 3))}),
    "no numbers": lambda path: rewrite(path, **{"quality.nf4": np.array([np.nan, 1.0])}),
    "another start": lambda path: rewrite(path, **{"hazard.start": np.array(1.0)}),
}


@pytest.mark.parametrize("ruin", RUINS.values(), ids=RUINS)
def test_a_damaged_state_is_set_aside_with_one_line(
    tmp_path: Path, ruin: object, caplog: pytest.LogCaptureFixture
) -> None:
    mine, policy = begun(tmp_path)
    play(policy, make_tapes(1, 1))
    save(mine, policy)
    path = Store(tmp_path).path(KEY.name)
    ruin(path)  # type: ignore[operator]
    with caplog.at_level(logging.INFO):
        again, fresh = begun(tmp_path)
    assert len(caplog.messages) == 1
    assert f"set aside as {path.name}{DAMAGED}" in caplog.messages[0]
    assert not path.exists()
    assert Path(f"{path}{DAMAGED}").exists()
    for key, value in make_policy(SPEC).state_dict().items():
        np.testing.assert_array_equal(fresh.state_dict()[key], value)
    play(fresh, make_tapes(1, 1))
    save(again, fresh)  # the run goes on, and what it learns is kept
    assert stored(tmp_path).header["steps"] == 1


def test_damage_while_a_run_goes_on_costs_nothing_that_it_knows(tmp_path: Path) -> None:
    mine, policy = begun(tmp_path, COUNTER)
    for _ in range(2):
        play(policy, make_tapes(1, 1))
        save(mine, policy)
        path = Store(tmp_path).path(KEY.name)
        found = stored(tmp_path)
        path.write_bytes(b"")
    save(mine, policy)
    assert float(stored(tmp_path).state["total"]) == float(found.state["total"])


def test_any_damaged_byte_is_found_or_harmless(tmp_path: Path) -> None:
    mine, policy = begun(tmp_path, COUNTER)
    play(policy, make_tapes(1, 1))
    save(mine, policy)
    path, rng = Store(tmp_path).path(KEY.name), random.Random(0)
    whole, right = path.read_bytes(), stored(tmp_path).state
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            found = Store(tmp_path).read(KEY)
        except Damaged:
            continue
        assert found is not None
        assert set(found.state) != set(right) or found.state["total"] == right["total"]


def test_the_oldest_go_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_FILES", 3)
    keys = [replace(KEY, target=str(i)) for i in range(5)]
    for i, key in enumerate(keys):
        mine, policy = record(tmp_path, COUNTER, key), make_policy(COUNTER)
        play(policy, make_tapes(1, 1))
        save(mine, policy)
        os.utime(Store(tmp_path).path(key.name), (i, i))
    (tmp_path / ".left.npz.x.part").write_bytes(b"of a killed process")
    os.utime(tmp_path / ".left.npz.x.part", (0, 0))
    save(mine, policy)
    assert list(Store(tmp_path).entries()) == [key.name for key in keys[:1:-1]]
    assert list(tmp_path.glob(".*.part")) == []
    monkeypatch.setattr(stores, "MAX_BYTES", 2 * Store(tmp_path).path(keys[-1].name).stat().st_size)
    save(mine, policy)
    assert list(Store(tmp_path).entries()) == [key.name for key in keys[:2:-1]]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to"):
        record(tmp_path / "file").read()


def test_a_lock_that_nobody_gives_back_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.05)
    store = Store(tmp_path)
    with store.locked(), pytest.raises(UserError, match="another process holds"):
        record(tmp_path).read()
    assert record(tmp_path).read() == {}
