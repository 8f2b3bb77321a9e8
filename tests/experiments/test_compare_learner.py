"""The learner: every batch counts once, in any order, also after a restart; the merged statistics are exact."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experiments.runtime.learner import Batches, Key, Learner, Merged, checkpoint_name, own_state, read_checkpoint
from experiments.runtime.patches import Changes, Patch, patched
from experiments.runtime.serialization import pack, unpack
from policies.base import Context, Outcome, Policy, State
from policies.registry import make_policy
from speckv_online.errors import UserError
from tests.support.runs import COUNTER, HERMIT, write_weights


def delta(total: float) -> State:
    return {"total": np.array(total)}


def test_a_batch_counts_once_however_often_it_arrives(tmp_path: Path) -> None:
    key = Key(COUNTER, 0)
    learner = Learner(tmp_path)
    assert learner.sync("", -1, {key: {}}) == {key: (0, {})}
    assert learner.sync("fp16", 0, {key: delta(3)})[key] == (1, {"total": 3.0})
    assert learner.sync("fp16", 0, {key: delta(3)})[key] == (1, {"total": 3.0})
    assert learner.sync("nf4", 0, {key: delta(4)})[key] == (2, {"total": 7.0})
    assert learner.sync("nf4", 2, {key: delta(1)})[key] == (3, {"total": 8.0})  # out of order
    assert learner.sync("nf4", 1, {key: delta(1)})[key] == (4, {"total": 9.0})
    assert learner.sync("nf4", 0, {Key(COUNTER, 1): delta(1)})[Key(COUNTER, 1)] == (1, {"total": 1.0})  # another order

    again = Learner(tmp_path)  # restarted: takes its checkpoints up and still knows what it has added
    assert again.sync("fp16", 0, {key: delta(3)})[key] == (4, {"total": 9.0})
    state, applied = read_checkpoint(tmp_path / checkpoint_name(key))
    assert (state, len(applied)) == ({"total": 9.0}, 4)


def test_merged_statistics_of_linucb_are_those_of_one_process(tmp_path: Path) -> None:
    spec = f"linucb:weights={write_weights(tmp_path / 'w.npz')},safety=off"
    alone, learner = make_policy(spec), Learner(tmp_path)
    workers = {level: make_policy(spec, worker=i) for i, level in enumerate(("fp16", "nf4"))}
    rng = np.random.default_rng(0)
    merged = Merged(0, {})
    for batch in range(4):
        for level, policy in workers.items():
            for _ in range(5):
                context = Context(level=level, mean_entropy=float(rng.uniform(0, 4)), acceptance=float(rng.uniform()))
                k = int(rng.integers(1, 8))
                n = int(rng.integers(0, k + 1))
                outcome = Outcome(k, n, min(n + 1, k), n + 1, 0.1, 0.02, 0.07, level)
                for p in (policy, alone):
                    decision = p.decide(context)
                    p.learn(decision, outcome)
            merged = learner.sync(level, batch, {Key(spec, 0): policy.take_delta()})[Key(spec, 0)]
    assert merged[0] == 8
    expected = alone.state_dict()
    assert set(merged[1]) == set(expected)
    for key, value in expected.items():
        if key.startswith("linear."):
            np.testing.assert_allclose(merged[1][key], value, rtol=1e-9, atol=1e-12)


def test_checkpoint_names_are_file_names_and_differ() -> None:
    keys = [("online", 0), ("online", 1), ("online:strength=2", 0), ("online:strength,2", 0), ("a/b:../c", 0)]
    names = [checkpoint_name(key) for key in keys] + [checkpoint_name(Key("online", 0, "nf4"))]
    assert len(set(names)) == len(names)
    assert names[0] == "policy-online-seed-0.npz"
    assert all("/" not in name for name in names)


def test_batches_are_kept_small_and_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches, reference = Batches(), set()
    for source, i in {(f"w{rng.integers(3)}", int(rng.integers(12))) for _ in range(60)}:
        batches.add(source, i)
        reference.add((source, i))
    again = Batches(json.loads(json.dumps(batches.packed())))
    for found in (batches, again):
        assert len(found) == len(reference)
        assert set(found) == reference
        assert all(((s, i) in found) == ((s, i) in reference) for s in ("w0", "w1", "w2", "w3") for i in range(-1, 14))
    filled = Batches()
    for i in range(1000):
        filled.add("w", i)
    assert filled.packed() == {"w": [1000]}  # what is kept does not grow with what was sent


def test_a_state_that_does_not_add_up_replaces_the_one_before(tmp_path: Path) -> None:
    key = Key(HERMIT, 0, "fp16.0")
    learner = Learner(tmp_path)
    assert learner.sync("a", 0, {key: delta(3)}, True)[key] == (1, {"total": 3.0})
    assert learner.sync("b", 0, {key: delta(5)}, True)[key] == (2, {"total": 5.0})
    assert learner.sync("a", 0, {key: delta(9)}, True)[key] == (2, {"total": 5.0})
    assert Learner(tmp_path).sync("", -1, {key: {}})[key] == (2, {"total": 5.0})


def test_a_batch_that_cannot_be_saved_does_not_count(tmp_path: Path) -> None:
    key = Key(COUNTER, 0)
    learner = Learner(tmp_path)
    learner.sync("a", 0, {key: delta(3)})
    learner.folder = tmp_path / "gone"
    learner.folder.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write"):
        learner.sync("b", 0, {key: delta(4)})
    learner.folder = tmp_path
    assert learner.sync("", -1, {key: {}})[key] == (1, {"total": 3.0})
    assert learner.sync("b", 0, {key: delta(4)})[key] == (2, {"total": 7.0})


def test_threads_share_checkpoints_and_lose_nothing(tmp_path: Path) -> None:
    key, learner = Key(COUNTER, 0), Learner(tmp_path)

    def worker(name: int) -> list[tuple[int, float]]:
        found = []
        for i in range(20):
            (merged,) = learner.sync(f"w{name}", i, {key: delta(name + 1)}).values()
            (asked,) = learner.sync("", -1, {key: {}}).values()
            state, batches = read_checkpoint(tmp_path / checkpoint_name(key))
            assert (f"w{name}", i) in batches  # what is confirmed is on disk
            assert merged.version <= asked.version <= len(batches)  # and so is what is handed out
            assert merged.state["total"] <= asked.state["total"] <= state["total"]
            found += [(merged.version, float(merged.state["total"])), (asked.version, float(asked.state["total"]))]
        versions = [version for version, _ in found[::2]]
        assert versions == sorted(set(versions))  # each of its batches makes a new one
        return found

    with ThreadPoolExecutor(6) as pool:
        versions = {pair for found in pool.map(worker, range(6)) for pair in found}
    assert len(versions) == len({version for version, _ in versions}) < 120  # a version has one state; some are shared
    assert max(versions) == (120, 20.0 * sum(range(1, 7)))
    state, batches = read_checkpoint(tmp_path / checkpoint_name(key))
    assert (float(state["total"]), len(batches)) == (20 * sum(range(1, 7)), 120)
    assert Learner(tmp_path).sync("w0", 3, {key: delta(1)})[key] == (120, state)


def test_a_full_disk_fails_every_batch_that_waited_for_it(tmp_path: Path) -> None:
    key, learner = Key(COUNTER, 0), Learner(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file where the folder should be")

    def worker(name: int) -> bool:
        try:
            learner.sync(f"w{name}", 0, {key: delta(1)})
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(worker, range(8)))
        learner.folder = tmp_path
        assert all(pool.map(worker, range(4, 12)))
    assert learner.sync("", -1, {key: {}})[key] == (8, {"total": 8.0})


def test_a_worker_that_is_behind_gets_what_changed_and_has_the_learner_s_state(tmp_path: Path) -> None:
    """Bit by bit, whatever version it has: none, an old one, one from before the learner was restarted."""
    spec, key = "online:acceptance=none,discount=0.99", Key("online:acceptance=none,discount=0.99", 0)
    rng, learner = np.random.default_rng(0), Learner(tmp_path)
    seats: list[tuple[int, State]] = [(0, {})] * 3  # the version and the state that each worker has
    sparse = 0
    for i in range(24):
        if i == 12:
            learner = Learner(tmp_path)
        w = int(rng.choice(3, p=[0.7, 0.2, 0.1]))
        version, state = seats[w]
        policy = make_policy(spec, worker=w)
        if state:
            policy.load_state_dict(state)
        for _ in range(4):
            play(policy, rng)
        merged = learner.sync(f"w{w}", i, {key: policy.take_delta()}, known={key: version})[key]
        sparse += isinstance(merged.state["history.table"], Patch)
        seats[w] = merged.version, patched(state, merged.state)
        whole = learner.sync("", -1, {key: {}})[key]
        assert whole.version == merged.version == i + 1
        assert set(seats[w][1]) == set(whole.state)
        for name, array in whole.state.items():
            assert isinstance(array, np.ndarray)
            np.testing.assert_array_equal(seats[w][1][name], array)
    assert 15 < sparse < 24


def play(policy: Policy, rng: np.random.Generator) -> None:
    """One step of a text of few words."""
    tokens, k = rng.integers(0, 9, 16).tolist(), int(rng.integers(1, 5))
    n = int(rng.integers(0, k + 1))
    context = Context(level="nf4", tokens=tokens[:8])
    outcome = Outcome(
        k, n, min(n + 1, k), n + 1, 0.1, 0.02, 0.07, "nf4", signals=rng.random((k, 4)), tokens=tokens[8 : 8 + k]
    )
    policy.learn(policy.decide(context), outcome)


def test_changes_are_sent_where_that_is_shorter() -> None:
    table = np.arange(2000.0)
    changes = Changes(3, {"table": table, "small": np.zeros(2)})
    one = table.copy()
    one[7] = -1.0
    changes.note(4, {"table": one, "small": np.ones(2)})
    two = one.copy()
    two[[7, 9]] = -2.0, -3.0
    changes.note(5, {"table": two, "small": np.ones(2)})
    assert indices(changes, 4) == [7, 9]
    assert indices(changes, 3) == [7, 9]
    assert indices(changes, 5) == []
    for unknown in (0, 2, 6):
        assert indices(changes, unknown) is None
    np.testing.assert_array_equal(patched({"table": table}, changes.since(3))["table"], two)
    assert table[7] == 7.0  # what was there is left alone
    changes.note(6, {"table": two + 1.0, "small": np.ones(2)})
    assert indices(changes, 5) is None  # all of it: the array itself is shorter


def indices(changes: Changes, version: int) -> list[int] | None:
    """Entries of the table that are sent to a worker of some version; None for all of them."""
    reply = changes.since(version)
    assert isinstance(reply["small"], np.ndarray)
    return reply["table"].where.tolist() if isinstance(reply["table"], Patch) else None


def test_what_goes_over_the_wire_comes_out_as_it_went_in() -> None:
    state = {
        "count": np.array(3.0), "flags": np.array([True, False, True]), "none": np.empty((2, 0)),
        "table": Patch(np.array([1, 5, 6], np.uint16), np.array([0.1, -np.inf, 2.0])),
        "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T, "same": Patch(np.empty(0, np.uint16), np.empty(0)),
    }  # fmt: skip
    again = unpack(pack(state))
    assert list(again) == list(state)
    for name, value in state.items():
        assert type(again[name]) is type(value)
        for got, want in zip(again[name], value, strict=True) if isinstance(value, Patch) else ((again[name], value),):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_array_equal(got, want)
            assert not got.flags.writeable
    assert unpack(pack({})) == {}
    assert unpack(pack({"none": np.empty(0)}))["none"].shape == (0,)
    with pytest.raises(ValueError, match="'odd' holds Python objects"):
        pack({"odd": np.array([None])})


@pytest.mark.parametrize("spec", ["online", "online:acceptance=none", "linucb", "lints"])
def test_policies_take_over_states_that_they_cannot_write_to(spec: str, tmp_path: Path) -> None:
    """As they come from Ray, and go on learning from there."""
    spec += f"{',' if ':' in spec else ':'}safety=off"
    learner, key, rng = Learner(tmp_path), Key(spec, 0), np.random.default_rng(0)
    policy = make_policy(spec)
    known: tuple[int, State] = (0, {})
    for i in range(3):
        for _ in range(20):
            play(policy, rng)
        if delta := policy.take_delta():
            merged = learner.sync("w", i, {key: delta}, known={key: known[0]})[key]
            known = merged.version, patched(known[1], unpack(pack(merged.state)))
            policy.load_state_dict(known[1])
    mine = own_state(policy)  # with what a policy keeps to itself
    for name, value in known[1].items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-9, atol=1e-12)
