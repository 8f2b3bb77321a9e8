"""The load experiment's blocks: kept as they are finished, each once, and only under the same settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.load.blocks import Blocks
from experiments.load.cell import answers, settings
from experiments.load.config import LoadConfig
from experiments.load.predicted import cut
from speckv_online.errors import UserError
from tests.support.replays import made

CONFIG = LoadConfig(contenders=("none", "1", "online"), concurrency=("1", "4"), rates=())


def block(contender: str, repeat: int = 1, rate: float = 10.0) -> dict[str, object]:
    return {"contender": contender, "loop": "closed", "load": 1.0, "repeat": repeat, "output_throughput": rate}


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path, about = tmp_path / "blocks.jsonl", settings(CONFIG, "ngram", "bfloat16")
    first = Blocks(path, about)
    first.add(block("none"))
    first.add(block("1"))
    with path.open("a") as file:
        file.write('{"contender": "online", "loop": "clo')  # killed while it wrote
    again = Blocks(path, about)
    assert again.found == [block("none"), block("1")]
    assert again.has("none", "closed", 1.0, 1)
    assert not again.has("online", "closed", 1.0, 1)
    assert not again.has("none", "closed", 1.0, 2)
    again.add(block("online"))
    last = Blocks(path, settings(replace(CONFIG, repeats=9), "ngram", "bfloat16"))  # more repetitions may follow
    assert [found["contender"] for found in last.found] == ["none", "1", "online"]
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", [{"requests": 3}, {"contenders": ("none", "2")}, {"warm": True}, {"varied": False}])
def test_other_settings_are_refused_in_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "blocks.jsonl"
    Blocks(path, settings(CONFIG, "ngram", "bfloat16")).add(block("none"))
    before = path.read_text()
    with pytest.raises(UserError, match=rf"other settings \({next(iter(change))}\)") as found:
        Blocks(path, settings(replace(CONFIG, **change), "ngram", "bfloat16"))
    assert "\n" not in str(found.value)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["[]\n{}\n", '{"contender": "none"}\n', '{"settings": {}}\n{"contender": "none"}\n'])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "blocks.jsonl").write_text(text)
    with pytest.raises(UserError, match="cannot go on from"):
        Blocks(tmp_path / "blocks.jsonl", {})
    assert (tmp_path / "blocks.jsonl").read_text() == text


def test_answers_vary_alike_in_every_run() -> None:
    lengths = list(answers(CONFIG).values())
    assert (min(lengths), max(lengths)) == (32, 64)
    assert lengths == list(answers(replace(CONFIG, seed=3, requests=1)).values())
    assert set(answers(replace(CONFIG, varied=False)).values()) == {64}


def test_a_trace_is_cut_as_if_no_more_had_been_asked_for() -> None:
    found = cut(made([3, 2, 1, 0, 2, 1, 0, 0]), 6)
    found.check()
    assert len(found) == found.budget == 6
    assert found.accepted.tolist() == [3, 2, 1, 0, 2, 1]
    assert np.array_equal(cut(found, 99).tokens, found.tokens)
