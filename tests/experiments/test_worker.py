"""What a worker exchanges of a policy that does not have something to share each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.runtime.learner import Key, checkpoint_name, read_checkpoint
from experiments.runtime.local_runner import run_local
from experiments.runtime.schedule import Node, plan
from experiments.runtime.work_queue import Job
from policies.base import State
from speckv_online.io.run_directory import read_units
from tests.support.runs import PROMPTS, Counter, make_config
from tests.support.tiny_models import TinyPair


class Odd(Counter):
    """Hands out what it counted at every second exchange, the first one included."""

    calls = 0

    def take_delta(self) -> State:
        self.calls += 1
        return super().take_delta() if self.calls % 2 else {}


class Even(Odd):
    """Hands nothing out at first: until it does, it is taken for one that shares nothing."""

    calls = 1


@pytest.mark.parametrize(("policy", "taught"), [(Odd, slice(0, 3)), (Even, slice(1, 2))])
def test_an_empty_exchange_does_not_keep_a_policy_from_sharing(
    tiny_pair: TinyPair, tmp_path: Path, policy: type[Odd], taught: slice
) -> None:
    spec = f"tests.experiments.test_worker:{policy.__name__}"
    config = make_config(tiny_pair, policies=(spec,), levels=("fp32",))
    for _ in run_local(Job(config, PROMPTS, tmp_path, plan(config, [Node(2)], 3))):
        pass
    state, _ = read_checkpoint(tmp_path / checkpoint_name(Key(spec, 0)))
    assert float(state["total"]) == sum([r.tokens for r in read_units(tmp_path)][taught])
