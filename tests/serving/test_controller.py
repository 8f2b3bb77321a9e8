"""What an engine asks of a policy, without an engine: real policies on a made-up machine."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.learned.online_engine import OnlineEngine
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.serving.controller import Controller
from speckv_online.serving.engine import Engine, EngineStep, Running, Verified
from speckv_online.serving.settings import Settings, engine_policy
from tests.support.serving import Raises

ENGINE = Engine("made 1", "bf16", "draft_model", False, 8, 16)


class Machine:
    """An engine that takes ``fixed + each * tokens`` for a forward, and ``draft`` for a round of drafts."""

    def __init__(self, controller: Controller, fixed: float, each: float, draft: float, seed: int = 0) -> None:
        self.controller, self.fixed, self.each, self.draft = controller, fixed, each, draft
        self.random = random.Random(seed)
        self.drafts: dict[str, int] = {}
        self.seconds = self.tokens = 0.0
        self.chosen: list[int] = []

    def run(self, rows: int, steps: int, chance: float) -> float:
        """Take steps with requests whose drafts are right with a chance; return tokens per second."""
        seconds, tokens = self.seconds, self.tokens
        ids = [f"request-{i}" for i in range(rows)]
        self.drafts = {id: n for id, n in self.drafts.items() if id in ids}
        for step in range(steps):
            usual = all(self.controller.decoding(id) for id in ids)
            gamma, rested = 0, usual and not any(self.drafts.values()) and self.controller.rests(rows)
            if not rested:
                gamma = self.controller.plan([Running(id, 100 + step, 1 << 20, 8) for id in ids])
            width = rows + sum(self.drafts.values())
            took = self.fixed + self.each * width + self.draft * gamma
            verified = []
            for id in ids:
                drafted = self.drafts.get(id, 0)
                accepted = next((j for j in range(drafted) if self.random.random() > chance), drafted)
                verified.append(Verified(id, drafted, accepted, accepted + 1))
                self.tokens += accepted + 1
            self.seconds += took
            self.chosen.append(gamma)
            noisy = took * self.random.uniform(0.97, 1.03)
            if rested:
                self.controller.rested(noisy)
                continue
            self.controller.learn(EngineStep(verified, gamma, gamma * rows, 0, noisy if usual else 0.0))
            made = dict.fromkeys(ids, gamma) if gamma else {}
            self.drafts = self.controller.trim(made) if made else {}
        return (self.tokens - tokens) / (self.seconds - seconds)


def best(rows: int, fixed: float, each: float, draft: float, chance: float) -> float:
    """Tokens per second of the best fixed number of drafts."""
    made = [sum(chance**j for j in range(n + 1)) for n in range(9)]
    return max(rows * made[n] / (fixed + each * rows * (n + 1) + draft * n) for n in range(9))


@pytest.mark.parametrize(
    ("rows", "each", "draft", "chance"),
    [
        (1, 0.001, 0.002, 0.8),
        (4, 0.001, 0.002, 0.6),
        (16, 0.001, 0.002, 0.8),
        (16, 0.004, 0.006, 0.3),
        (8, 0.0, 0.0, 0.9),
    ],
)
def test_online_is_near_the_best_fixed_number(rows: int, each: float, draft: float, chance: float) -> None:
    found = []
    for seed in range(3):  # a fixed number has its luck, too
        machine = Machine(Controller(Settings(), ENGINE), 0.02, each, draft, seed)
        machine.run(rows, 200, chance)
        found.append(machine.run(rows, 800, chance))
    assert sum(found) / 3 > 0.97 * best(rows, 0.02, each, draft, chance)


def test_it_comes_back_after_a_change_of_load_and_of_text() -> None:
    machine = Machine(Controller(Settings(), ENGINE), 0.02, 0.002, 0.003)
    places = [(1, 0.8), (16, 0.2), (1, 0.8), (1, 0.1), (1, 0.8)]
    for rows, chance in places:
        machine.run(rows, 200, chance)
        assert machine.run(rows, 600, chance) > 0.95 * best(rows, 0.02, 0.002, 0.003, chance)


def test_fixed_numbers_are_fixed() -> None:
    machine = Machine(Controller(Settings("fixed:3"), ENGINE), 0.02, 0.001, 0.001)
    machine.run(4, 50, 0.5)
    assert set(machine.chosen) == {3}
    counts = machine.controller.collect()
    assert counts.total("drafted_tokens") == 3 * 4 * 49
    assert counts.total("trimmed_tokens") == 0
    assert 0.4 < counts.of("accepted_tokens")[("0",)] / counts.of("drafted_tokens")[("0",)] < 0.6


def test_a_policy_that_raises_falls_back_to_the_configured_number() -> None:
    machine = Machine(Controller(Settings(f"{Raises.__module__}:Raises"), ENGINE), 0.02, 0.001, 0.001)
    machine.run(1, 30, 0.5)
    assert machine.chosen == [8 if i % 3 == 2 else 2 for i in range(30)]
    assert machine.controller.collect().of("fallbacks") == {("decide raised",): 10}


SPECS = ("online", "fixed:4", "vllm-table:1/4/3/5/16/1", "leviathan", "ucbspec", "online:cap=2")
REQUEST = st.tuples(st.integers(0, 20), st.integers(0, 10), st.integers(0, 8))


@settings(max_examples=60, deadline=None)
@given(spec=st.sampled_from(SPECS), looks_up=st.booleans(), steps=st.lists(st.lists(REQUEST, max_size=20), max_size=15))
def test_numbers_are_always_possible(spec: str, looks_up: bool, steps: list[list[tuple[int, int, int]]]) -> None:
    controller = Controller(Settings(spec), Engine("made 1", "bf16", "any", looks_up, 8, 32))
    drafts: dict[str, int] = {}
    for step in steps:
        requests = {f"request-{i}": (left, most) for i, (_, left, most) in enumerate(step)}
        controller.forget(set(drafts) - set(requests))
        gamma = controller.plan([Running(id, 10, left, most) for id, (left, most) in requests.items()])
        limits = {id: max(min(8, most, left - 1), 0) for id, (left, most) in requests.items()}
        assert 0 <= gamma <= max(limits.values(), default=0)
        verified = [Verified(id, n, n // 2, n // 2 + 1) for id, n in drafts.items() if id in requests]
        controller.learn(EngineStep(verified, gamma, gamma * len(requests), 0, 0.02 if verified else 0.0))
        made = {f"request-{i}": min(found, gamma) for i, (found, _, _) in enumerate(step)}
        drafts = controller.trim(made)
        assert set(drafts) == set(made)
        assert all(0 <= n <= min(made[id], limits[id]) for id, n in drafts.items())
    assert not controller.collect().of("fallbacks")


def test_a_state_is_taken_up(tmp_path: Path) -> None:
    told = Settings(state=str(tmp_path / "state.npz"))
    first = Machine(Controller(told, ENGINE), 0.02, 0.001, 0.002)
    first.run(4, 400, 0.7)
    first.controller.save(last=True)
    again = Controller(told, ENGINE)
    assert again.resumed
    assert again.policy.batch_costs.level("bf16").verify == pytest.approx(
        first.controller.policy.batch_costs.level("bf16").verify, rel=0.05
    )
    assert max(Machine(again, 0.02, 0.001, 0.002).chosen, default=0) == 0
    other = Controller(told, Engine("another engine", "bf16", "draft_model", False, 8, 16))
    assert not other.resumed
    assert (tmp_path / "state.npz.aside").exists()


def test_kill_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    program = (
        "from tests.serving.test_controller import *\n"
        f"c = Controller(Settings(state={str(path)!r}), ENGINE)\n"
        "m = Machine(c, 0.02, 0.001, 0.002)\n"
        "while True:\n    m.run(4, 5, 0.7)\n    c.save(last=True)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Controller(Settings(state=str(path)), ENGINE).resumed


def test_a_damaged_state_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    path.write_bytes(b"no state")
    assert not Controller(Settings(state=str(path)), ENGINE).resumed
    assert not path.exists()


def test_settings() -> None:
    assert Settings.read({"policy": "fixed:2"}, {"SPECKV_STATE": "file"}) == Settings("fixed:2", "file")
    assert Settings.read(None, {}) == Settings("online")
    for wrong in ({"polcy": "online"}, {"policy": 3}, "online"):
        with pytest.raises(UserError):
            Settings.read(wrong, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean online"):
        engine_policy("onlin")


def test_online_inside_an_engine_keeps_what_it_learnt() -> None:
    policy = engine_policy("online:cap=3", most_rows=64)
    assert policy.cap == 3  # type: ignore[attr-defined]
    one, other = OnlineEngine(), OnlineEngine()
    machine = Machine(
        Controller(Settings("policies.learned.online_engine:OnlineEngine:safety=off"), ENGINE), 0.02, 0.001, 0.002
    )
    machine.run(2, 100, 0.7)
    state = machine.controller.policy.state_dict()
    one.load_state_dict(state)
    for key, value in one.state_dict().items():
        assert value == pytest.approx(state[key]), key
    other.merge(machine.controller.policy.take_delta())
    assert other.model.head.mean == pytest.approx(one.model.head.mean, abs=0.05)
    assert make_policy("online").joint
