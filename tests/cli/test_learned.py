"""``speckv generate --remember`` and ``speckv learned``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speckv_online.learned.store import Store
from tests.support.cli import Run
from tests.support.tiny_models import TinyPair, loaded_after


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def generate(speckv: Run, tiny_pair: TinyPair) -> Run:
    pair = ["--target", tiny_pair.target_dir, "--draft", tiny_pair.draft_dir, "--threads", 1, "--device", "cpu"]
    return lambda *more: speckv("generate", *pair, "--prompt", "hello", "--max-new-tokens", 12, *more)


def test_a_second_call_starts_from_the_first(generate: Run) -> None:
    first = json.loads(generate("--remember", "--json")[1])
    assert first["remembered"]["steps_before"] == 0
    assert first["remembered"]["steps"] == first["steps"]
    second = json.loads(generate("--remember", "--json", "--seed", 5)[1])
    assert second["remembered"]["key"] == first["remembered"]["key"]
    assert second["remembered"]["steps_before"] == first["steps"]
    assert second["remembered"]["steps"] == first["steps"] + second["steps"]
    _, out, _ = generate("--remember")
    assert f"started from {second['remembered']['steps']} remembered steps]" in out
    nf4 = json.loads(generate("--remember", "--json", "--compression", "nf4")[1])
    assert nf4["remembered"]["steps_before"] == 0


def test_without_the_flag_nothing_is_read_or_written(generate: Run, cache: Path) -> None:
    code, out, _ = generate("--json")
    assert code == 0
    assert json.loads(out)["remembered"] is None
    assert list(cache.iterdir()) == []


def test_list_show_and_forget(speckv: Run, generate: Run, tiny_pair: TinyPair) -> None:
    assert speckv("learned", "list")[1].startswith("nothing is remembered in ")
    steps = json.loads(generate("--remember", "--json")[1])["steps"]
    generate("--remember", "--compression", "fp32")
    code, out, err = speckv("learned", "list")
    heads, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert heads.split()[:6] == ["KEY", "POLICY", "LEVEL", "TARGET", "DRAFT", "STEPS"]
    assert [row.split()[1:3] for row in rows] == [["online", "fp32"], ["online", "fp16"]]
    listed = json.loads(speckv("learned", "list", "--json")[1])
    name = rows[1].split()[0]
    (state,) = (s for s in listed["states"] if s["name"] == name)
    assert state["steps"] == steps
    assert state["tokens"] == 12
    assert state["names"] == {"target": tiny_pair.target_dir.name, "draft": tiny_pair.draft_dir.name}
    assert state["key"]["policy"] == "online"

    shown = json.loads(speckv("learned", "show", name[:8], "--json")[1])
    assert {key: shown[key] for key in state} == state
    assert shown["arrays"]["history.table"] == [2, 12288]
    _, out, _ = speckv("learned", "show", name)
    assert f"steps         {steps}" in out.splitlines()
    assert f"target name   {tiny_pair.target_dir.name}" in out.splitlines()

    assert speckv("learned", "forget", name)[1] == f"forgotten: {name}\n"
    assert [s["name"] for s in json.loads(speckv("learned", "list", "--json")[1])["states"]] == [rows[0].split()[0]]
    assert speckv("learned", "forget", "--all")[:2] == (0, f"forgotten: {rows[0].split()[0]}\n")
    assert speckv("learned", "forget", "--all")[1].startswith("nothing is remembered")


def test_damaged_files_are_shown_and_forgotten(speckv: Run, generate: Run) -> None:
    name = json.loads(generate("--remember", "--json")[1])["remembered"]["key"]
    path = Store().path(name)
    path.write_bytes(b"damage")
    assert json.loads(speckv("learned", "list", "--json")[1])["damaged"] == [path.name]
    code, _, err = speckv("learned", "show", name)
    assert code == 2
    assert err.startswith(f"speckv: error: {path} cannot be read")
    assert len(err.splitlines()) == 1
    assert json.loads(generate("--remember", "--json")[1])["remembered"]["steps_before"] == 0
    code, _, err = speckv("learned", "list")
    assert (code, err) == (0, f"damaged: {path.name}.damaged in {path.parent}\n")
    speckv("learned", "forget", "--all")
    assert list(path.parent.glob("*.npz*")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nothing"], "no state begins with 'nothing'"),
        (["show", ""], "no state begins with ''"),
        (["forget"], "name a state, or give --all"),
        (["forget", "x", "--all"], "name a state, or give --all"),
    ],
)
def test_mistakes_are_one_line(speckv: Run, arguments: list[str], says: str) -> None:
    code, out, err = speckv("learned", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err


def test_a_beginning_of_several_names_is_refused(speckv: Run, generate: Run) -> None:
    name = json.loads(generate("--remember", "--json")[1])["remembered"]["key"]
    folder = Store().folder
    (folder / f"{name[:4]}other.npz").write_bytes(b"")
    code, _, err = speckv("learned", "forget", name[:4])
    assert code == 2
    assert f"2 states begin with '{name[:4]}'" in err


def test_the_command_loads_nothing_heavy() -> None:
    code = "from speckv_online.cli.app import main; main(['learned', 'list'])"
    assert not {"torch", "transformers"} & set(loaded_after(code, "torch", "transformers"))
