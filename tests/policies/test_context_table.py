"""What is remembered of drafts after the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.acceptance.context_table import SHRINK_PAIR, SHRINK_SINGLE, TAIL, TokenHistory, buckets, place
from policies.acceptance.features import rows
from policies.base import Context, Draft, Outcome, PolicyError
from policies.learned.online import Online
from speckv_online.training.acceptance import excess, tokens_from_traces, train_acceptance
from tests.support.made_traces import made_trace


def note(history: TokenHistory, rows: list[tuple[tuple[int, ...], bool]], memory: dict | None = None) -> None:
    for tail, hit in rows:
        history.note({} if memory is None else memory, place(tail), hit)
        history.step()


def draws(seed: int, count: int) -> list[tuple[tuple[int, ...], bool]]:
    rng = np.random.default_rng(seed)
    return [(tuple(rng.integers(0, 30, TAIL).tolist()), bool(rng.random() < 0.4)) for _ in range(count)]


def test_the_longest_suffix_seen_before_counts() -> None:
    history, memory = TokenHistory(), {}
    note(history, [((1, 2, 3, 4), True), ((9, 9, 3, 4), False), ((5, 6, 7, 8), True)], memory)
    for tail, longest, spread in (
        ((1, 2, 3, 4), 4, [0, 0, 0, 1]), ((0, 0, 3, 4), -2, [0, -1, 0, 0]), ((0, 0, 0, 8), 1, [1, 0, 0, 0]),
        ((4, 3, 2, 1), 0, [0, 0, 0, 0]), ((8,), 1, [1, 0, 0, 0]),
    ):  # fmt: skip
        seen = history.look_up(memory, place(tail))
        assert seen[0] == longest
        assert rows(np.array([[0.0] * 12 + [*seen, 3.0]]))[0, 0, 10:].tolist() == [*spread, *seen[1:]]
    assert history.look_up({}, place((1, 2, 3, 4)))[0] == 0
    assert history.look_up(memory, place(())) == (0, 0.0, 0.0)


def test_the_table_holds_shrunk_excess_acceptance() -> None:
    history = TokenHistory()
    note(history, [((1, 2), True)] * 3 + [((7, 2), False)] + [((3, 4), False)] * 4)
    mean = 3 / 8
    assert history.look_up({}, place((1, 2)))[1] == pytest.approx((3 - mean * 4) / (4 + SHRINK_SINGLE))
    assert history.look_up({}, place((1, 2)))[2] == pytest.approx((3 - mean * 3) / (3 + SHRINK_PAIR))
    table = history.table()
    rows = np.array([buckets((1, 2)), buckets((3, 4)), buckets((2,))])
    want = [history.look_up({}, place(tail))[1:] for tail in ((1, 2), (3, 4), (2,))]
    np.testing.assert_allclose(excess(table, rows), want)


def test_what_is_old_counts_less() -> None:
    history = TokenHistory(discount=0.9)
    note(history, [((1, 2), True)] * 30 + [((5, 6), False)] * 300)
    labelled = history.table()[0]
    assert labelled[buckets((1, 2))[0]] == pytest.approx(sum(0.9 ** (i + 300) for i in range(1, 31)), abs=1e-9)
    assert labelled[buckets((5, 6))[0]] == pytest.approx(9.0)


@pytest.mark.parametrize("discount", [1.0, 0.99])
def test_merged_tables_are_one_process_s(discount: float) -> None:
    alone, learner = TokenHistory(discount=discount), TokenHistory(discount=discount)
    for worker in range(4):
        rows, copy = draws(worker, 40), TokenHistory(discount=discount)
        note(alone, rows)
        note(copy, rows)
        learner.merge(copy.take_delta())
        assert len(copy.take_delta()["history.index"]) == 0
    np.testing.assert_allclose(learner.table(), alone.table(), atol=1e-9)


def test_a_merge_changes_no_more_of_the_state_than_it_adds_to() -> None:
    """Also with forgetting, until the weight of the entries is set back to one."""
    learner, worker = TokenHistory(discount=0.99), TokenHistory(discount=0.99)
    note(worker, draws(1, 20))
    learner.merge(worker.take_delta())
    resets, want = 0, learner.table()
    for i in range(80):
        before = learner.state()
        note(worker, draws(i, 20))
        delta = worker.take_delta()
        learner.merge(delta)
        want = 0.99**20 * want
        want[:, delta["history.index"]] += delta["history.sums"]
        now = learner.state()
        if now["history.weight"] > before["history.weight"]:
            changed = np.flatnonzero((now["history.table"] != before["history.table"]).any(axis=0))
            assert set(changed) == set(delta["history.index"])
        else:
            resets += 1
        again = TokenHistory(discount=0.99)
        again.load(now)
        for history in (learner, again):
            np.testing.assert_allclose(history.table(), want, rtol=1e-9, atol=1e-12)
    assert resets == 1


def test_merging_leaves_what_is_not_shared_yet() -> None:
    history, other = TokenHistory(), TokenHistory()
    note(history, draws(1, 5))
    note(other, draws(2, 9))
    want = TokenHistory()
    note(want, draws(1, 5))
    history.merge(other.take_delta())
    mine, expected = history.take_delta(), want.take_delta()
    np.testing.assert_array_equal(mine["history.index"], expected["history.index"])
    np.testing.assert_allclose(mine["history.sums"], expected["history.sums"], atol=1e-9)
    for bad in (np.array([-1]), np.array([10**6]), np.array([0.5])):
        with pytest.raises(PolicyError, match=r"history\.index"):
            history.merge({"history.index": bad, "history.sums": np.zeros((2, 1)), "history.count": np.array(1.0)})


def test_a_prompt_s_own_drafts_do_not_vouch_for_it() -> None:
    """Left out of their own table: with a single prompt the table says nothing in training."""
    tokens = tokens_from_traces([made_trace(0, "nf4")])
    rows = tokens.with_history(tokens.counts(), str(tokens.group[0, 0]))
    assert np.abs(rows.before[:, -2:]).max() < 1e-9
    assert np.abs(tokens.with_history(tokens.counts()).before[:, -2:]).max() > 0.01
    assert train_acceptance(tokens)["history"].sum() > 0


def test_a_policy_learns_ids_from_the_draft_and_from_its_outcome() -> None:
    policy, context = Online(acceptance="none"), Context(tokens=[1, 2, 3, 4, 5])
    step = policy.decide(context).features
    signals = np.full((4, 4), 0.9)
    step.extend(2, Draft(2, signals[:2], [6, 7]))
    # A late outcome has the ids of its own step.
    step.extend(4, Outcome(4, 4, 4, 5, signals=signals, tokens=[6, 7, 8, 9]))
    assert [where for _, where, _, _ in step.asked] == [
        place(tail) for tail in ((2, 3, 4, 5), (3, 4, 5, 6), (4, 5, 6, 7), (5, 6, 7, 8))
    ]


@given(st.lists(st.integers(0, 200_000), max_size=TAIL).map(tuple))
def test_a_place_is_a_number_for_each_suffix_and_both_buckets(tail: tuple[int, ...]) -> None:
    keys, *where = place(tail)
    assert len(set(keys)) == len(tail)
    assert keys == tuple(place(tail[-n:])[0][-1] for n in range(1, len(tail) + 1))
    assert tuple(where) == buckets(tail)


@given(*[st.lists(st.integers(0, 200_000), min_size=1, max_size=TAIL).map(tuple)] * 2)
def test_two_suffixes_never_have_the_same_number(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert (place(one)[0][-1] == place(other)[0][-1]) == (one == other)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=TAIL).map(tuple), st.booleans()), max_size=20))
def test_a_text_remembers_the_latest_draft_after_every_suffix(rows: list[tuple[tuple[int, ...], bool]]) -> None:
    """As a plain dictionary of all suffixes does."""
    history, memory, plain = TokenHistory(), {}, {}
    for tail, hit in rows:
        suffixes = [tail[-n:] for n in range(1, len(tail) + 1)]
        longest = max((len(s) for s in suffixes if s in plain), default=0)
        want = longest if longest == 0 or plain[tail[-longest:]] else -longest
        assert history.look_up(memory, place(tail))[0] == want
        history.note(memory, place(tail), hit)
        plain |= dict.fromkeys(suffixes, hit)
