"""The layout: three layers, no import circle, folders and files of a size that can be read."""

from __future__ import annotations

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
#: Upper layers import from lower ones, never the other way round.
LAYERS = ("experiments", "speckv_online", "policies")
MOST_MODULES, MOST_LINES = 15, 350
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """All imports, those inside functions and under ``TYPE_CHECKING`` included."""
    return grimp.build_graph(*LAYERS, cache_dir=None)


def find_cycle(graph: grimp.ImportGraph) -> list[str]:
    """Return the modules of an import circle in order, the first one also last; empty if there is none."""
    sorter = TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in sorted(graph.modules)})
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_circle(graph: grimp.ImportGraph) -> None:
    assert graph.modules >= {"policies.base", "speckv_online.decoding.loop", "experiments.compare.__main__"}
    assert find_cycle(graph) == []


LATE = {
    "plain": "import made.a",
    "in a function": "def f():\n    import made.a",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import made.a",
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_circle_is_found(late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made"
    package.mkdir()
    for name, text in {"__init__": "", "a": "import made.b", "b": "import made.c", "c": late}.items():
        (package / f"{name}.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = find_cycle(grimp.build_graph("made", cache_dir=None))
    finally:
        sys.modules.pop("made", None)
    assert set(found) == {"made.a", "made.b", "made.c"}


def test_layers(graph: grimp.ImportGraph) -> None:
    wrong = graph.find_illegal_dependencies_for_layers(layers=LAYERS)
    chains = {f"{d.importer} -> {d.imported}: {d.routes}" for d in wrong}
    assert not chains


def test_no_module_imports_a_package_face(graph: grimp.ImportGraph) -> None:
    """Faces are for users. Inside, an import names the module that it needs."""
    faces = {m for m in graph.modules if graph.find_children(m)} - set(LAYERS)
    imports = {(m, face) for face in faces for m in graph.find_modules_that_directly_import(face)}
    assert not imports


def test_folders_are_small() -> None:
    folders = {path.parent for path in SOURCES}
    crowded = {
        str(folder.relative_to(ROOT)): len(modules)
        for folder in folders
        if len(modules := [f for f in folder.glob("*.py") if not f.name.startswith("__")]) > MOST_MODULES
    }
    assert not crowded


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_test_imports_another() -> None:
    wrong = re.compile(r"^\s*(from|import) tests\.(\w+\.)*test_", re.MULTILINE)
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert [str(p.relative_to(ROOT)) for p in tests if wrong.search(p.read_text(encoding="utf-8"))] == []
