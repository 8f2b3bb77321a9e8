"""What the results of replays depend on besides their settings: code, shipped data, and versions of libraries."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Folder that holds the packages.
ROOT = Path(__file__).parents[2]
PACKAGES = ("policies", "speckv_online", "experiments")
#: Libraries that replays calculate with.
LIBRARIES = ("numpy", "river")


def digest(modules: Iterable[str], settings: str = "", policies: Iterable[str] = (), root: Path = ROOT) -> str:
    """Return a short hash of all that bears on replays.

    Counted are the settings, the code of some modules and of all that they import, all of ``policies`` (found by name,
    so no import shows it), the data that ships with both, policies of other packages, files that options of policies
    name, and versions of libraries.

    Parameters
    ----------
    modules : iterable of str
        Modules that play the replays.
    settings : str
        What results depend on besides.
    policies : iterable of str
        Spec strings of the policies that are played.
    root : Path
        Folder that holds the packages.
    """
    made = hashlib.sha256(settings.encode())
    for name in LIBRARIES:
        made.update(f"{name} {_version(name)}".encode())
    files = {root / path for path in sources(modules, root)} | set((root / "policies").rglob("*.py"))
    for package in ("policies", "speckv_online"):
        files |= {file for file in (root / package / "data").iterdir() if file.suffix in (".npz", ".json")}
    for file in sorted(files):
        made.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    for file in sorted({file for spec in policies for file in _files_of(spec)}):
        made.update(file.read_bytes())
    return made.hexdigest()[:16]


def sources(modules: Iterable[str], root: Path = ROOT) -> set[Path]:
    """Return the files of modules and of all that they import from :data:`PACKAGES`, relative to ``root``.

    Imports inside functions and for types only count, too.
    """
    found: set[Path] = set()
    todo = list(modules)
    while todo:
        path = _file(todo.pop(), root)
        if path is None or path in found:
            continue
        found.add(path)
        # Importing a module runs the packages around it.
        found |= {p for parent in path.parents if (root / (p := parent / "__init__.py")).is_file()}
        todo += _imports(ast.parse((root / path).read_bytes()))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str, root: Path) -> Path | None:
    """Return a module's file, None for a name inside a module or of another package."""
    if module.partition(".")[0] not in PACKAGES:
        return None
    stem = Path(*module.split("."))
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if (root / p).is_file()), None)


def _files_of(spec: str) -> Iterator[Path]:
    """Yield the files that a policy is made of: its code, if it is of another package, and what its options name."""
    from policies.registry import policy_class

    cls = policy_class(spec)
    code = inspect.getsourcefile(cls)
    if code and cls.__module__.partition(".")[0] not in PACKAGES:
        yield Path(code)
    yield from (path for text in re.split("[:,=]", spec) if (path := Path(text).expanduser()).is_file())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
