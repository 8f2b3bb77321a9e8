"""Decoders that remember: what the next one starts from, what it never takes, and that nothing stops decoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.base import PolicyError, State
from policies.registry import make_policy
from speckv_online.decoding.decoder import SpeculativeDecoder
from speckv_online.decoding.hf_assistant import PolicyAssistant
from speckv_online.errors import UserError
from speckv_online.learned.memory import Memory
from speckv_online.learned.store import Store, learned_dir
from tests.support.decoding import plain, prompt_of
from tests.support.runs import COUNTER, ROOT, Counter, environment
from tests.support.tiny_models import TinyPair, perturbed, tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    return tmp_path


def decoder(pair: TinyPair, policy: Any = COUNTER, **options: Any) -> SpeculativeDecoder:
    options = {"target": pair.target, "remember": True, **options}
    return SpeculativeDecoder(options.pop("draft", pair.draft), policy=policy, **options)


def decode(one: SpeculativeDecoder, tokens: int = 12, seed: int = 0) -> SpeculativeDecoder:
    one.generate(prompt_of(9, seed), tokens)
    return one


def memory(one: SpeculativeDecoder | PolicyAssistant) -> Memory:
    assert one.memory is not None
    return one.memory


def total(one: SpeculativeDecoder) -> float:
    return float(one.policy.state_dict()["total"])


def test_nothing_is_written_unless_asked_for(tiny_pair: TinyPair, cache: Path) -> None:
    one = decode(SpeculativeDecoder(tiny_pair.draft, policy="online", target=tiny_pair.target))
    assert one.memory is None
    assert list(cache.iterdir()) == []


def test_the_next_decoder_starts_where_this_one_ended(tiny_pair: TinyPair) -> None:
    first = decode(decoder(tiny_pair, "online:safety=off"), 40)
    memory(first).save()
    second = decoder(tiny_pair, "online:safety=off")
    memory(second).begin(second.target, second.drafter, second.level)
    states = [one.policy.state_dict() for one in (first, second)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        np.testing.assert_array_equal(states[1][key], value, err_msg=key)
    assert memory(second).steps == len(first.last.steps)  # type: ignore[union-attr]
    assert decode(second, 30).last.tokens == plain(tiny_pair.target, prompt_of(9), 30)  # type: ignore[union-attr]


def test_credit_of_an_earlier_run_is_not_spent_and_its_debts_stay(tiny_pair: TinyPair) -> None:
    for budget, left in ((180.0, 50.0), (-20.0, -20.0)):
        one = decode(decoder(tiny_pair, "online"))
        guard: Any = one.policy.policy
        guard.ledger(one.level).budget = budget
        memory(one).save()
        other = decoder(tiny_pair, "online")
        memory(other).begin(other.target, other.drafter, other.level)
        ledger: Any = other.policy.policy
        assert ledger.ledger(one.level).budget == left
        Store().forget(list(Store().entries()))


def test_decoders_at_once_add_up_and_learn_from_each_other(tiny_pair: TinyPair) -> None:
    one, two = decode(decoder(tiny_pair)), decode(decoder(tiny_pair), seed=1)
    memory(one).save()
    memory(two).save()
    assert total(two) == total(one) + 12
    decode(one)
    memory(one).save()
    assert total(one) == 36
    assert total(decode(decoder(tiny_pair))) == 48


def test_other_models_levels_and_devices_start_afresh(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    one = decode(decoder(tiny_pair))
    memory(one).save()
    others: list[dict[str, Any]] = [
        {"target": perturbed(tiny_pair.target, 0.01, seed=5)},
        {"draft": perturbed(tiny_pair.draft, 0.01, seed=5)},
        {"draft": None},
        {"level": "nf4"},
    ]
    for options in others:
        assert total(decode(decoder(tiny_pair, **options))) == 12
    assert total(decode(decoder(tiny_pair, f"{COUNTER}:seed=3"))) == 24
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert total(decode(decoder(tiny_pair))) == 12


def test_one_decoder_changes_over_with_its_target_and_weights() -> None:
    target, other = tiny_llama(), tiny_llama(7)
    one = SpeculativeDecoder(perturbed(target, 0.03), policy=COUNTER, target=target, remember=True)
    assert total(decode(one)) == 12
    one.bind(other)
    assert total(decode(one)) == 12
    one.bind(target)
    assert total(decode(one)) == 24
    with torch.no_grad():
        target.lm_head.weight.mul_(1.01)  # trained further: another model
    assert total(decode(one)) == 12
    memory(one).save()
    assert sorted(head["tokens"] for head in Store().entries().values() if head) == [12, 12, 24]


def test_batch_sizes_are_kept_apart(tiny_pair: TinyPair) -> None:
    prompts = [prompt_of(5, seed) for seed in range(3)]
    one = decoder(tiny_pair)
    one.decode_batch(prompts, 8)
    memory(one).save()
    assert total(one) == 24
    single = decode(decoder(tiny_pair))  # one row: nothing is known
    assert total(single) == 12
    memory(single).save()
    again = decoder(tiny_pair)
    again.decode_batch([*prompts, prompt_of(4)], 8)  # four rows: as three
    assert total(again) == 24 + 32
    assert total(decode(again)) == 12 + 12


def test_a_batch_size_that_is_new_goes_on_from_what_the_process_knows(tiny_pair: TinyPair) -> None:
    one = decode(decoder(tiny_pair))
    one.decode_batch([prompt_of(5), prompt_of(6)], 8)
    assert total(one) == 12 + 16
    memory(one).save()
    assert sorted(head["tokens"] for head in Store().entries().values() if head) == [12, 16]


class Broken(Counter):
    """Cannot be asked for its state."""

    def state_dict(self) -> State:
        raise RuntimeError("no state today")


class Shut(Counter):
    """Takes no state."""

    def load_state_dict(self, state: State) -> None:
        raise PolicyError("not this one")


def test_policies_that_fail_cost_nothing_but_their_memory(tiny_pair: TinyPair) -> None:
    for name in ("Broken", "Shut"):
        for _ in range(2):
            one = decode(decoder(tiny_pair, f"tests.learned.test_memory:{name}"), 20)
            memory(one).save()
            assert one.last.tokens == plain(tiny_pair.target, prompt_of(9), 20)  # type: ignore[union-attr]


def test_a_cache_that_cannot_be_written_is_one_line(
    tiny_pair: TinyPair, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "learned").write_text("in the way")
    one = decode(decode(decoder(tiny_pair), 20), 20)
    memory(one).save()
    assert one.last.tokens == plain(tiny_pair.target, prompt_of(9), 20)  # type: ignore[union-attr]
    (line,) = caplog.messages
    assert line.startswith("nothing more of what is learnt is remembered: cannot write")


def test_policies_of_ones_own_need_a_name(tiny_pair: TinyPair) -> None:
    with pytest.raises(UserError, match='remember="NAME"'):
        decoder(tiny_pair, Counter())
    memory(decode(decoder(tiny_pair, Counter(), remember="mine"))).save()
    assert total(decode(decoder(tiny_pair, Counter(), remember="mine"))) == 24
    assert total(decode(decoder(tiny_pair, make_policy(COUNTER), remember="other"))) == 12


def test_options_in_another_order_are_the_same_policy(tiny_pair: TinyPair) -> None:
    memory(decode(decoder(tiny_pair, "online:refresh=64,cap=8"))).save()
    other = decode(decoder(tiny_pair, "goodput:cap=8,refresh=64"))
    assert memory(other).steps > 0


def test_transformers_own_loop_remembers_apart(tiny_pair: TinyPair) -> None:
    ids = torch.tensor([prompt_of(9)])
    memory(decode(decoder(tiny_pair))).save()  # our loop takes other seconds
    found = []
    for _ in range(2):
        assistant = PolicyAssistant(COUNTER, remember=True)
        with assistant.attached_to(tiny_pair.target):
            for _ in range(2):
                tiny_pair.target.generate(
                    ids, attention_mask=torch.ones_like(ids), assistant_model=tiny_pair.draft, do_sample=False,
                    max_new_tokens=10,
                )  # fmt: skip
        memory(assistant).save()
        found.append(float(assistant.policy.state_dict()["total"]))
    assert found[0] == 20
    assert found[1] == 40
    assert sorted(head["tokens"] for head in Store().entries().values() if head) == [12, 40]


SCRIPT = """
from speckv_online.decoding.decoder import SpeculativeDecoder
from tests.support.runs import COUNTER
from tests.support.tiny_models import tiny_llama
import os
decoder = SpeculativeDecoder(None, policy=COUNTER, target=tiny_llama(), remember=True)
decoder.generate([1, 2, 3], 10)
if child := os.fork():
    os.waitpid(child, 0)
    print(decoder.memory.steps)
else:
    decoder.memory.save()
    del decoder
"""


def test_the_end_of_a_process_writes_what_is_left_and_a_fork_does_not(cache: Path) -> None:
    env = environment(SPECKV_CACHE=str(cache), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (head,) = Store().entries().values()
    assert head is not None
    assert head["tokens"] == 10


def test_it_lies_in_the_users_cache_and_nobody_else_reads_it(tiny_pair: TinyPair, cache: Path) -> None:
    memory(decode(decoder(tiny_pair))).save()
    assert learned_dir() == cache / "learned"
    assert os.stat(learned_dir()).st_mode & 0o077 == 0
